"""`python -m pltrace`."""

from pltrace._cli import main

if __name__ == "__main__":
    raise SystemExit(main())
