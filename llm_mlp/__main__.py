from llm_mlp.cli import main

main()
