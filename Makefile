# Everything a person runs, by one word each. `make demo` first, `make test` before a commit.
#
# RocksDB takes many minutes to compile, so all targets share one profile and one build directory outside the
# checkout: a fresh clone on the same machine reuses it.

CACHE_DIR := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/d-engine
export CARGO_TARGET_DIR ?= $(CACHE_DIR)/target
# Where `make setup` puts Rust if it has to install it.
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

.DEFAULT_GOAL := help
.PHONY: help setup setup-demo setup-bench demo example test soak figures bench bench-quick generate fmt lint build

help: ## Shows this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## Installs what building and testing need and the machine lacks
	@scripts/setup test

setup-demo:
	@scripts/setup demo

setup-bench:
	@scripts/setup bench

demo: setup-demo build ## Starts three servers, loads real data, kills a leader, cuts one off, checks every promise
	@$(CARGO_TARGET_DIR)/debug/d-engine-demo

build: ## Builds everything
	@cargo build --workspace --bins

test: ## Runs every check; changes nothing in the tree
	@scripts/test

example: build ## Runs an example that is one program: NAME=quick-start-embedded, ARGS="..."
	@cd examples/$(NAME) && $(CARGO_TARGET_DIR)/debug/d-engine-example-$(NAME) $(ARGS)

soak: ## Runs the fault test for an hour and draws it; DURATION=600, SEED=..., NODES=5 and PICTURE=... choose otherwise
	@scripts/faults --seconds $(or $(DURATION),3600) --nodes $(or $(NODES),3) $(if $(SEED),--seed $(SEED)) --picture $(or $(PICTURE),$(CACHE_DIR)/soak.svg)

figures: build ## Measures everything in docs/figures.md on this machine, in about half an hour; WHAT=embedded and such: only that
ifdef WHAT
	@$(CARGO_TARGET_DIR)/debug/d-engine-bench $(WHAT)
else
	@$(CARGO_TARGET_DIR)/debug/d-engine-bench
	@$(CARGO_TARGET_DIR)/debug/d-engine-bench embedded
	@$(CARGO_TARGET_DIR)/debug/d-engine-bench rolling
	@$(CARGO_TARGET_DIR)/debug/d-engine-bench restart
	@$(CARGO_TARGET_DIR)/debug/d-engine-bench snapshot
endif

# The newest etcd, built through the Go module proxy.
ETCD := $(CACHE_DIR)/etcd/etcd
COMPARE = $(CARGO_TARGET_DIR)/debug/d-engine-compare --etcd etcd --etcd $(ETCD) --report bench/report.json

bench: setup-bench $(ETCD) build ## Measures beside etcd; writes bench/report.json and docs/etcd.svg; more by ARGS="--churn-seconds 3600"
	@$(COMPARE) --picture docs/etcd.svg $(ARGS)

bench-quick: setup-bench $(ETCD) build ## The same, meant for less than five minutes: shorter, no million keys, no picture
	@$(COMPARE) --rounds 3 --seconds 0.5 --kills 1 --keys 0 $(ARGS)

$(ETCD): bench/etcd/main.go bench/etcd/go.mod bench/etcd/go.sum
	@mkdir -p $(@D)
	@cd bench/etcd && go build -mod=readonly -o $@ .

generate: ## Regenerates checked-in code from proto/
	@cargo run --quiet -p d-engine-proto-generate

fmt: ## Formats the sources
	@cargo fmt --all
	@gofmt -w tests/linearizability bench/etcd

lint: ## Runs clippy as the tests do
	@cargo clippy --workspace --all-targets -- -D warnings
