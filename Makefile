# nvstore: see README.md. "make" alone lists what there is.

GO       ?= go
FUZZTIME ?= 60s
KILLS    ?= 1000
SCALE    ?= 20

.DEFAULT_GOAL := help
.PHONY: help build demo setup lint test bench fuzz torture stress mutants clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' Makefile

build: ## bin/nvtool, static, and bin/nvtpm, which loads libtpms
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/ ./cmd/nvtool ./cmd/nvtpm

demo: build ## the whole story on real input; needs Go alone
	scripts/demo.sh

setup: ## install the Debian packages that tests compare with, if any is missing
	@scripts/setup-debian.sh

lint: ## formatting, go vet, and the rules of the house
	@bad=$$(git ls-files '*.go' | xargs gofmt -l); test -z "$$bad" || { echo "gofmt: $$bad"; exit 1; }
	$(GO) vet ./...
	$(GO) test ./internal/lint

# What has goroutines of its own. cmd/nvtool runs one process a step, which the
# race detector makes slow, and shares memory only in these. ONE is left out:
# what counts bytes or measures memory, and what talks to one client. Of those
# that derive many keys, sync much or cut the power often, what runs side by
# side is enough.
RACE  = ./crypto/secret ./eeprom ./image ./image/adapt ./image/chain ./image/convert ./image/nbd/... ./internal/qmp ./machine/live \
	./image/raw ./nvstore/... ./tpmstate/... ./cmd/nvtpm
ONE   = ^Test(Memory|MemoryIsBounded|Growth|CommitCost|AdoptCrash|FS|GoTPM|Tools|MigrationKeys|SwtpmFiles|SwtpmFlips|Firmware|Damage|LiveReadme)$$
RACE2 = ./blobdir ./image/luks ./image/pebbledev ./image/qcow2

test: setup lint build ## all tests, once more in short with the race detector where there are goroutines, 50 kills
	$(GO) test -timeout 20m ./...
	scripts/torture.sh 50
	$(GO) test -race -short -timeout 20m -skip '$(ONE)' $(RACE)
	$(GO) test -race -short -timeout 20m -run '^Test(ReadsGoOn|Packed|Trim)|Conformance$$|Parallel|Concurrent' -skip 'Feature|TestConformance/(v1_cast5|2097152)' $(RACE2)

bench: ## tables: each operation beside its peers, as ratios
	$(GO) test ./bench -count=1 -timeout 2h -run '^TestTables$$' -v -tables

fuzz: ## every fuzz target for FUZZTIME (60s)
	FUZZTIME=$(FUZZTIME) scripts/fuzz.sh

torture: build ## KILLS (1000) times: kill -9 in the middle of transactions, then verify
	scripts/torture.sh $(KILLS)

stress: ## the random tests SCALE (20) times as long, and all of it with the race detector; hours
	NVSTORE_SCALE=$(SCALE) $(GO) test -count=1 -timeout 24h ./...
	$(GO) test -race -short -timeout 24h ./...

mutants: ## take each rule out of the code, and see a test fail
	$(GO) run ./internal/mutate

clean: ## remove what was built
	rm -rf bin tmp
