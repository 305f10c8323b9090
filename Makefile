# The two commands that matter are `make demo` and `make test`; `make help` lists the rest.
# Everything works as root on a fresh Debian 12 or 13 with a Rust toolchain.

SHELL := /bin/bash
.DEFAULT_GOAL := help
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
E2E := $(TARGET)/release/freeflow-e2e
export FREEFLOW_GUEST_BIN := $(abspath $(TARGET))/release/freeflow-guest

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

.PHONY: setup
setup: ## Install the Debian packages that building and testing need
	@qemu/setup

.PHONY: build
build: setup ## Build everything, optimised
	$(CARGO) build --release --workspace

.PHONY: images
images: build ## Build and cache what test guests need (VMM, kernels, root file systems, driver)
	$(FREEFLOW_GUEST_BIN) prepare --all

.PHONY: demo
demo: build ## Two QEMU guests run perftest against each other, on one host, then on two (HOSTS=n: on n alone)
ifdef HOSTS
	$(E2E) demo --hosts $(HOSTS)
else
	$(E2E) demo
	$(E2E) demo --hosts 2
endif

.PHONY: test
test: lint unit images guests ## Every test: lints, units, the in-process guest, real guests

.PHONY: lint
lint: setup ## Formatting and lints
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings

.PHONY: unit
unit: setup ## Unit tests and the in-process guest against the real device, on one host and between several (minutes)
	$(CARGO) test --workspace --quiet
	FREEFLOW_TEST_PATH=tcp $(CARGO) test -p freeflow-tests --quiet --test rc --test uc --test ud --test atomics --test srq --test windows --test mcast --test gsi --test odp --test model
	FREEFLOW_TEST_PATH=cut $(CARGO) test -p freeflow-tests --quiet --test rc --test atomics --test srq --test model
	FREEFLOW_TEST_PATH=bad $(CARGO) test -p freeflow-tests --quiet --test srq --test uc --test ud --test windows
	FREEFLOW_TEST_PATH=fabric $(CARGO) test -p freeflow-tests --quiet --test rc --test atomics --test srq --test lifecycle --test model

.PHONY: unit-nic
unit-nic: setup ## The in-process tests over a fake RDMA NIC that works at once, one that works late, and two of two hosts (minutes)
	FREEFLOW_TEST_PATH=verbs $(CARGO) test -p freeflow-tests --quiet
	FREEFLOW_TEST_PATH=shuffled $(CARGO) test -p freeflow-tests --quiet
	FREEFLOW_TEST_PATH=fabric $(CARGO) test -p freeflow-tests --quiet

.PHONY: unit-tcp
unit-tcp: setup ## The in-process tests with a host for each virtual NIC, and with connections that break or are bad (minutes)
	FREEFLOW_TEST_PATH=tcp $(CARGO) test -p freeflow-tests --quiet
	for suite in $(RELIABLE); do FREEFLOW_TEST_PATH=cut $(CARGO) test -p freeflow-tests --quiet --test $$suite || exit 1; done
	for suite in $(PATIENT); do FREEFLOW_TEST_PATH=bad $(CARGO) test -p freeflow-tests --quiet --test $$suite || exit 1; done

.PHONY: faults
faults: setup ## Connections between hosts that break, and a bad network, under load for minutes, every byte compared (FAULT_OPS=n)
	for network in cut bad; do FREEFLOW_TEST_PATH=$$network FREEFLOW_OPS=$(FAULT_OPS) $(CARGO) test -p freeflow-tests --test model -- --nocapture || exit 1; done
	$(CARGO) test -p freeflow-tests --test tcp
	FREEFLOW_SCHEDULES=100000 $(CARGO) test -p freeflow-tcp
FAULT_OPS := 300000
# Suites of reliable connections.
RELIABLE := rc atomics srq windows words fast_reg model
# And those whose tests do not give up early.
PATIENT := $(RELIABLE) uc ud gsi mcast odp errors events objects resize

.PHONY: guests
guests: images ## Unmodified software in real guests
	$(E2E) test

.PHONY: apps
apps: images ## UCX, libfabric and other users of RDMA between guests, their data checked
	$(E2E) apps $(if $(HOSTS),--hosts $(HOSTS))

.PHONY: nic
nic: images ## The path over a host's RDMA NIC, in a guest that plays the host, with rxe for the NIC
	$(E2E) nic

.PHONY: conformance
conformance: images ## rdma-core's own tests on the virtual NIC and on rxe, side by side
	$(E2E) conformance

.PHONY: matrix
matrix: images ## Every program, flag, size, distribution and VMM (hours; PART=2/40 for a part)
	$(E2E) matrix $(if $(PART),--part $(PART))

.PHONY: bench
bench: images ## Measure; writes the table and target/bench.json
	-@qemu/setup --peers
	$(CARGO) run --release -p freeflow-tests --bin bench

.PHONY: debug-kernel
debug-kernel: images ## The driver under a kernel that looks for its mistakes: KASAN, lockdep, kmemleak (half an hour and more; builds that kernel once)
	FREEFLOW_UML_DEBUG=1 $(E2E) driver

# Both need a nightly compiler's options; this has the stable one take them.
fuzz asan: export RUSTC_BOOTSTRAP = 1
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
HOST_VARIABLE = $(shell echo $(HOST) | tr a-z- A-Z_)
SECONDS := 60
FUZZ := commands operations rings stream

.PHONY: fuzz
fuzz: setup ## Look for inputs that break the device: SECONDS=60 for each of FUZZ="commands operations rings stream" (needs cargo-fuzz)
	@command -v cargo-fuzz >/dev/null || { echo "make fuzz: install it with: cargo install cargo-fuzz" >&2; exit 1; }
	set -e; cd tests/fuzz; for target in $(FUZZ); do \
		mkdir -p corpus-found/$$target; \
		$(CARGO) fuzz run --target-dir $(abspath $(TARGET))/fuzz $$target corpus-found/$$target corpus/$$target -- \
			-max_total_time=$(SECONDS) -timeout=20 -rss_limit_mb=4096; \
	done

.PHONY: sanitize
sanitize: asan memcheck ## Unit and in-process tests with AddressSanitizer, and under valgrind (needs valgrind)

.PHONY: asan
asan: export RUSTFLAGS = -Zsanitizer=address
asan: setup
	$(CARGO) test --quiet --target $(HOST) --target-dir $(abspath $(TARGET))/asan $(IN_PROCESS)

# Not under valgrind: loom, which switches stacks by itself, a test that looks at the clock, and one that gives the system memory that is
# not there.
.PHONY: memcheck
memcheck: export CARGO_TARGET_$(HOST_VARIABLE)_RUNNER = valgrind -q --error-exitcode=99 --leak-check=no --fair-sched=yes
memcheck: export PROPTEST_CASES = 16
memcheck: export FREEFLOW_OPS = 2000
memcheck: setup
	@command -v valgrind >/dev/null || { echo "make memcheck: install the package valgrind" >&2; exit 1; }
	$(CARGO) test --quiet $(IN_PROCESS) -- --test-threads=2 --skip interleavings --skip a_deaf_destination --skip memory_that_is_gone_is_an_error

IN_PROCESS = -p virtio-rdma -p freeflow-backend -p freeflow-tests --lib --tests

.PHONY: deny
deny: ## Licences and advisories of dependencies (needs cargo-deny)
	$(CARGO) deny check

.PHONY: clean
clean: ## Remove build results; cached guest images stay (qemu/guest prints where)
	$(CARGO) clean
