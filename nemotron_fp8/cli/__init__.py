"""The ``nemotron-fp8`` command."""
