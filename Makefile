# Two commands do all the set-up: `make demo` shows it, `make test` tests it. CONTRIBUTING.md has the rest.
.PHONY: demo venv test check lint nightly fresh release clean

demo:
	@uv=$$(.ci/uv) && echo "installing what the demo needs into .venv" && \
	    $$uv sync --frozen --no-dev --extra demo && $$uv run --no-sync keymgmt demo

# For an editor, a debugger and pytest: every package, editable, and what the tests need.
venv:
	@uv=$$(.ci/uv) && .ci/packages && { $$uv sync --frozen --all-packages --all-extras || \
	    { .ci/packages build-essential libtss2-dev pkg-config python3-dev; exit 1; }; }

# TOX="-e py311-core" runs less.
test:
	@.ci/test $(TOX)

check:
	@.ci/test -e check

lint:
	@.ci/test -e lint,types

nightly:
	@KEYMGMT_TEST_NIGHTLY=1 .ci/test -e nightly,fuzz,other-programs,docs

# README's and CONTRIBUTING's commands on fresh Debian 12 and 13 machines, as root. TOX="-e py314-core" tests less.
fresh:
	@TOX='$(TOX)' .ci/fresh

release:
	@.ci/release "$(VERSION)"

clean:
	rm -rf .tox .tools .venv dist build .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
