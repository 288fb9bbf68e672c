"""What the performance tables are made by: `python -m benchmarks NAME`."""
