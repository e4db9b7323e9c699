.PHONY: check test docs bench wheel

check:  ## style and types
	pip install -q "ruff>=0.9" "mypy>=1.13"
	ruff format --check .
	ruff check .
	mypy

test:
	pytest -n 2

docs:  ## the site, in site/; every warning is an error, dead links and anchors among them
	pip install -q -e ".[docs]"
	mkdocs build --strict

wheel:  ## sdist and from it the wheel, in dist/; tests/docs/test_wheel.py looks into one
	pip install -q build
	python -m build

bench:  ## the numbers of docs/BENCHMARKS.md, on this machine
	pip install -q -e ".[bench]"
	python benchmarks/gradients.py
	python benchmarks/main_job.py
	python benchmarks/engine.py
	python benchmarks/analysis.py
