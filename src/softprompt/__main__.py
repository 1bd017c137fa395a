"""`python -m softprompt` is the command `softprompt`."""

from .cli.main import main

if __name__ == "__main__":
    main()
