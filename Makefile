# `make` lists the targets. Works with GNU make 3.81 (macOS) and any POSIX shell.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --editable
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 10))'

# An environment whose Python is gone counts as not installed.
STALE := $(shell $(BIN)/python $(NEW_ENOUGH) 2>/dev/null || echo FORCE)

.PHONY: help demo app install lint test check clean FORCE

help:
	@echo "make demo   train the embedded model, show answers before and after, export it"
	@echo "make app    the same and more in the browser"
	@echo "make test   run the tests"
	@echo "make check  run the linter, the type checker and the tests"
	@echo "make clean  remove $(VENV), caches and what the demo wrote"
	@echo
	@echo "Another Python (3.10 or newer): make demo PYTHON=python3.12"

demo: $(VENV)/installed
	@$(BIN)/python -m dora_mlx.train --run demo --overwrite
	@for prompt in "Hello!" "What is the capital of France?" "What colour is the sky?"; do \
		echo; \
		$(BIN)/python -m dora_mlx.chat --run demo --compare --prompt "$$prompt" || exit $$?; \
	done
	@echo
	@$(BIN)/python -m dora_mlx.export --run demo --format safetensors \
		--output exports/demo-safetensors --overwrite
	@$(BIN)/python -m dora_mlx.export --run demo --format gguf \
		--output exports/demo-f16.gguf --overwrite

app: $(VENV)/installed
	@$(BIN)/python -m app

install: $(VENV)/installed-dev

lint: $(VENV)/installed-dev
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy

test: $(VENV)/installed-dev
	@$(BIN)/python -m pytest

check: lint test

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	rm -rf runs/demo exports/demo-safetensors exports/demo-f16.gguf
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that works stays; one whose Python is gone or too old is made anew.
define make_environment
	@$(BIN)/python $(NEW_ENOUGH) 2>/dev/null && $(BIN)/python -m pip --version >/dev/null 2>&1 \
	|| { \
		command -v $(PYTHON) >/dev/null || { \
			echo "error: $(PYTHON) was not found. Install Python 3.10 or newer" \
				"(macOS: brew install python; Debian: apt install python3 python3-venv)." >&2; \
			exit 1; \
		}; \
		$(PYTHON) $(NEW_ENOUGH) 2>/dev/null || { \
			echo "error: $(PYTHON) is too old: dora-mlx needs Python 3.10 or newer." \
				"Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
			exit 1; \
		}; \
		$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
			echo "error: $(PYTHON) has no venv module." \
				"Debian and Ubuntu: sudo apt install python3-venv" >&2; \
			exit 1; \
		}; \
		$(PYTHON) -m venv --clear $(VENV) || exit 1; \
	}
endef

define say_install_failed
	{ echo "error: pip could not install what pyproject.toml lists; its message is above." \
		"The first installation needs a network." >&2; exit 1; }
endef

$(VENV)/installed: pyproject.toml $(STALE)
	$(make_environment)
	@echo "Installing dora-mlx into $(VENV): some hundred MB, a minute or more."
	@echo "pip says nothing until it is done ..."
	@$(PIP) . || $(say_install_failed)
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(STALE)
	$(make_environment)
	@echo "Installing dora-mlx and its development tools into $(VENV): some hundred MB,"
	@echo "a minute or more. pip says nothing until it is done ..."
	@$(PIP) '.[dev]' || $(say_install_failed)
	@touch $(VENV)/installed $@
