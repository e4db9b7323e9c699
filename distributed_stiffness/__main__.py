"""`python -m distributed_stiffness`, the same as `stiffness`."""

from distributed_stiffness.cli import main

main()
