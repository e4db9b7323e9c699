.PHONY: check test bench

check:  ## style and types
	pip install -q "ruff>=0.9" "mypy>=1.13"
	ruff format --check .
	ruff check .
	mypy

test:
	pytest

bench:  ## the numbers of docs/BENCHMARKS.md, on this machine
	pip install -q -e ".[bench]"
	python benchmarks/gradients.py
	python benchmarks/main_job.py
	python benchmarks/engine.py
	python benchmarks/analysis.py
