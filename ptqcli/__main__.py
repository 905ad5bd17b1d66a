"""``python -m ptqcli`` is ``ptq``: what torchrun and accelerate start."""

from ptqcli.cli import main

if __name__ == "__main__":
    main()
