"""Text and conversations to batches: tokenizer, chat template, sources, tokenised shards, loader."""

from llm_mlp.data.chat import ChatError, ChatTemplate
from llm_mlp.data.loader import Batch, Loader, held_out_batches
from llm_mlp.data.shards import Dataset, TokenData, prepare
from llm_mlp.data.sources import DataError, Document, read_documents, sample_source, source_files
from llm_mlp.data.tokenizer import DecodeStream, Tokenizer, TokenizerError

__all__ = [
    "Batch",
    "ChatError",
    "ChatTemplate",
    "DataError",
    "Dataset",
    "DecodeStream",
    "Document",
    "Loader",
    "TokenData",
    "Tokenizer",
    "TokenizerError",
    "held_out_batches",
    "prepare",
    "read_documents",
    "sample_source",
    "source_files",
]
