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
demo: build ## Two QEMU guests run perftest against each other over their virtual RDMA NICs
	$(E2E) demo

.PHONY: test
test: lint unit images guests ## Every test: lints, units, the in-process guest, real guests

.PHONY: lint
lint: setup ## Formatting and lints
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings

.PHONY: unit
unit: setup ## Unit tests and the in-process guest against the real device (seconds to minutes)
	$(CARGO) test --workspace --quiet

.PHONY: guests
guests: images ## Unmodified software in real guests
	$(E2E) test

.PHONY: apps
apps: images ## UCX, libfabric and other users of RDMA between guests, their data checked
	$(E2E) apps

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

.PHONY: deny
deny: ## Licences and advisories of dependencies (needs cargo-deny)
	$(CARGO) deny check

.PHONY: clean
clean: ## Remove build results; cached guest images stay (qemu/guest prints where)
	$(CARGO) clean
