"""`python -m cooperllm`: the command line."""

from cooperllm.cli import main

if __name__ == "__main__":
    main()
