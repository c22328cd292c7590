# The host side of the virtio memory balloon. After a clone, `make test` and `make demo` do all the set-up:
# Debian packages that are missing (as root), .venv, the native modules. Nothing is done twice.
#
#   make          build in place, into .venv       PYTHON=/path/to/python3   which Python .venv is made of
#   make demo     reporting, live                  DEMO_ARGS='--guest driver'
#   make test     the whole suite                  PYTEST_ARGS='-x -k ring'
#   make test-nested   a stock Linux under examples/kvm_vmm.py, itself in a Linux that QEMU emulates
#   make soak     three real guests at one daemon for half an hour    SOAK_SECONDS=60, SOAK=tests for all that takes minutes
#   make attacks  what a guest notices while another front-end attacks the daemon    ATTACKS='flood idle'
#   make asan     the unit tests under AddressSanitizer and UndefinedBehaviorSanitizer (PYTEST_ARGS too)
#   make bench    all benchmarks, in about 5 minutes: build/bench has the JSON, a table, the pictures
#                 BENCH_ARGS='-k walk'; BENCH_DOCS=1 renews those of docs/performance.md too
#   make lint     floors, file lengths, ruff, mypy, stubs, cython-lint
#   make clean    remove all that make has made
#
# BALLOON_DEBUG=1 and BALLOON_TRACE=1 build other native modules, see setup.py.

PYTHON ?= python3

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build
.PHONY: build demo test test-nested soak attacks asan bench lint clean packages guest FORCE

VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq
SETUP := $(BIN)/python -W ignore setup.py -q
NATIVE := $(wildcard $(addprefix balloon/,*.pyx *.pxd *.h */*.pyx */*.pxd */*.h))
GUEST_PACKAGES := user-mode-linux busybox-static
COUNT_PACKAGES := $(if $(filter test bench,$(MAKECMDGOALS)),valgrind)
QEMU_PACKAGES := $(if $(filter test-nested,$(MAKECMDGOALS)),qemu-system-x86 e2fsprogs)

ifneq ($(BALLOON_SANITIZE),)
$(error BALLOON_SANITIZE: sanitized modules are built apart, by `make asan`)
endif

# .venv belongs to one Python and one place, the native modules to one set of switches.
python := $(shell $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) and print(sys.version.split()[0], sys.base_prefix)' 2>/dev/null)
venv := $(python) in $(CURDIR)
switches := debug=$(BALLOON_DEBUG) trace=$(BALLOON_TRACE)
ifneq ($(venv),$(file <$(VENV)/.python))
venv_stale := FORCE
endif
ifneq ($(switches),$(file <$(VENV)/.switches))
switches_stale := FORCE
endif

build_requires := import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'])
bench_requires := import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['bench'])

# How sanitized code is run: any finding ends the process, pymalloc does not hide what lies behind an object,
# and the package in ASAN_LIB comes before the one in the current folder and the installed one.
ASAN_LIB := build/asan/lib
ASAN_RUN = env ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
    PYTHONMALLOC=malloc PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(ASAN_LIB) $(BIN)/python

build: $(VENV)/.built
	:

demo: build guest
	$(BIN)/balloon demo $(DEMO_ARGS)

test: build guest
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-nested: build guest
	BALLOON_REQUIRE=nested $(BIN)/python -m pytest -m nested -o faulthandler_timeout=0 tests/e2e/test_nested.py $(PYTEST_ARGS)

SOAK_SECONDS ?= 1800
SOAK ?= tests/e2e/test_soak.py
soak: build guest
	BALLOON_REQUIRE=uml BALLOON_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -s -m soak -o faulthandler_timeout=0 \
	    $(SOAK) $(PYTEST_ARGS)

attacks: build
	$(BIN)/python tests/attacks/attack_table.py $(ATTACKS)

# A fork of a process with threads can stop for ever in libasan's allocator, which also ends a process that asks for
# more memory than there is: these tests are left to `make test`. So are the command line and the README, which have
# nothing native of their own, and most of the random examples.
# The in-place build is not touched. What is not native is copied anew, without what is gone from the tree.
asan: build
	echo 'balloon: building sanitized modules into $(ASAN_LIB)'
	[ ! -d $(ASAN_LIB) ] || find $(ASAN_LIB) -type f '(' ! -name '*.so' -o ! -newer setup.py ')' -delete
	log=$$(BALLOON_SANITIZE=1 $(SETUP) build --build-base build/asan --build-lib $(ASAN_LIB) --parallel "$$(nproc)" 2>&1) ||
	    { echo "$$log" >&2; exit 1; }
	$(ASAN_RUN) tests/asan_canary.py $(ASAN_LIB)
	BALLOON_EXPECT_BUILD=$(CURDIR)/$(ASAN_LIB) BALLOON_EXAMPLES=30 $(ASAN_RUN) -m pytest --capture=sys -o faulthandler_timeout=300 \
	    -m 'not e2e and not slow' --ignore=tests/e2e --ignore=tests/test_house.py --ignore=tests/test_races.py \
	    --ignore=tests/test_cli.py --ignore=tests/test_readme.py --ignore=tests/test_disposal.py \
	    -k 'not fork and not child and not layout_that_cannot_be_made' tests $(PYTEST_ARGS)

# One that fails does not keep the others from the table.
BENCH := build/bench
bench: build guest
	$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(PIP) $$($(BIN)/python -c "$(bench_requires)")
	rm -rf $(BENCH)
	mkdir -p $(BENCH)
	status=0
	$(BIN)/python -m pytest benchmarks -q -o faulthandler_timeout=0 --benchmark-quiet \
	    --benchmark-json=$(BENCH)/bench.json --junitxml=$(BENCH)/junit.xml $(BENCH_ARGS) || status=$$?
	$(BIN)/python benchmarks/instructions.py --json $(BENCH)/instructions.json || status=$$?
	$(BIN)/python benchmarks/guest.py --json $(BENCH)/guest.json || status=$$?
	table() { $(BIN)/python benchmarks/table.py $(BENCH)/*.json --junit $(BENCH)/junit.xml "$$@"; }
	pictures() { $(BIN)/python benchmarks/pictures.py $(BENCH)/*.json "$$@"; }
	table | tee $(BENCH)/table.md
	pictures $(BENCH)
	if [ -n '$(BENCH_DOCS)' ]; then
	    table --into docs/performance.md
	    pictures docs/pictures
	fi
	exit $$status

lint: build
	$(BIN)/python -m pytest -q -m 'not slow' tests/test_house.py $(PYTEST_ARGS)

# Debian packages: what the build lacks (asked of the tools themselves, since PYTHON need not be Debian's),
# what a real guest is made of, what counts instructions, and QEMU for test-nested. Where the last three are missing
# all goes on: the demo and the tests say what they miss.
packages:
	if [ -z '$(python)' ]; then
	    echo 'balloon: $(PYTHON) is not Python 3.11 or newer: install it, or set PYTHON' >&2
	    exit 1
	fi
	lacking() {
	    [ -n '$(venv_stale)' ] || return 0
	    command -v gcc >/dev/null || echo gcc
	    echo '#include <stdio.h>' | gcc -E - >/dev/null 2>&1 || echo libc6-dev
	    $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
	    $(PYTHON) -c 'import sysconfig; open(sysconfig.get_config_var("INCLUDEPY") + "/Python.h")' 2>/dev/null ||
	        echo python3-dev
	}
	apt() {
	    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$$@" </dev/null >>"$$log" 2>&1
	}
	wanted=($$(lacking))
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	    for package in $(GUEST_PACKAGES) $(COUNT_PACKAGES) $(QEMU_PACKAGES); do
	        state=$$(dpkg-query -W -f='$${Status}' $$package 2>/dev/null) || true
	        [[ $$state == *' ok installed' ]] || wanted+=($$package)
	    done
	    if [ $${#wanted[@]} -gt 0 ]; then
	        echo "balloon: apt-get install $${wanted[*]}"
	        log=$$(mktemp)
	        trap 'rm -f "$$log"' EXIT
	        apt update || true # one dead mirror is no reason to stop: the install decides
	        apt install -y --no-install-recommends "$${wanted[@]}" || tail -n 5 "$$log" >&2
	        wanted=($$(lacking))
	    fi
	fi
	if [ $${#wanted[@]} -gt 0 ]; then
	    echo "balloon: $(PYTHON) and gcc cannot build this: as root, apt-get install $${wanted[*]}" >&2
	    exit 1
	fi

# Without the guest's packages: the same, unpacked into a cache folder, unless they are there.
guest: build
	$(BIN)/python -m balloon.testing.uml --fetch >/dev/null || echo 'balloon: going on without a real guest' >&2

$(VENV)/.python: $(venv_stale) | packages
	echo 'balloon: making $(VENV) of Python $(python)'
	rm -rf $(VENV) build
	$(PYTHON) -m venv $(VENV)
	echo '$(venv)' >$@

$(VENV)/.switches: $(switches_stale) | $(VENV)/.python
	echo '$(switches)' >$@

$(VENV)/.built: $(VENV)/.python $(VENV)/.switches pyproject.toml setup.py $(NATIVE)
	touch $(VENV)/.building # what is edited from here on is newer than the stamp
	find balloon $(wildcard $(ASAN_LIB)) -name '*.so' | while read -r module; do # of sources that are gone
	    source=$${module#$(ASAN_LIB)/}
	    [ -e "$${source%%.*}.pyx" ] || rm "$$module"
	done
	case ' $? ' in
	*' $(VENV)/.python '* | *' pyproject.toml '*)
	    echo 'balloon: pip install, and building the native modules'
	    $(PIP) $$($(BIN)/python -c "$(build_requires)")
	    printf '[build_ext]\nparallel = %s\n' "$$(nproc)" >$(VENV)/build.cfg
	    DIST_EXTRA_CONFIG=$(CURDIR)/$(VENV)/build.cfg $(PIP) --no-build-isolation -e '.[test]'
	    ;;
	*)
	    echo 'balloon: building the native modules'
	    $(SETUP) build_ext --inplace -j"$$(nproc)" $(if $(filter $(VENV)/.switches setup.py,$?),--force)
	    ;;
	esac
	mv $(VENV)/.building $@

clean:
	rm -rf $(VENV) build dist *.egg-info .benchmarks .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find balloon -name '*.so' -delete
	find balloon tests benchmarks examples -depth -name __pycache__ -exec rm -rf {} + 2>/dev/null || true
