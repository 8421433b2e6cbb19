# Two commands do all the set-up: `make demo` shows it, `make test` tests it.
.PHONY: demo test lint clean

demo:
	@uv=$$(.ci/uv) && $$uv sync --quiet --frozen --no-dev --extra demo && $$uv run --no-sync keymgmt demo

# TOX="-e py311-core" runs less.
test:
	@.ci/test $(TOX)

lint:
	@.ci/test -e lint,types

clean:
	rm -rf .tox .tools .venv dist build .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
