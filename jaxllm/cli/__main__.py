"""Run the command line as `python -m jaxllm.cli`."""

import sys

from jaxllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
