"""``python -m nemotron_fp8`` is the ``nemotron-fp8`` command."""

from nemotron_fp8.cli.start import main

if __name__ == "__main__":
    main()
