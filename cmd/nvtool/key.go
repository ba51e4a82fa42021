package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/nvstore"
)

// slotFacts is a key slot as --json shows it.
type slotFacts struct {
	ID          int    `json:"id"`
	Label       string `json:"label"`
	Type        string `json:"type"`
	Usable      bool   `json:"usable"`
	MemoryKiB   uint32 `json:"memory_kib,omitempty"`
	Time        uint32 `json:"time,omitempty"`
	Parallelism uint8  `json:"parallelism,omitempty"`
}

func slotList(in []keyslot.Info) []slotFacts {
	list := make([]slotFacts, len(in))
	for i, s := range in {
		list[i] = slotFacts{ID: s.ID, Label: s.Label, Type: string(s.Type), Usable: s.Usable}
		if p := s.Argon2; p != nil {
			list[i].MemoryKiB, list[i].Time, list[i].Parallelism = p.MemoryKiB, p.Time, p.Parallelism
		}
	}
	return list
}

func (a *app) keyLsCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	c := a.verb("ls IMAGE", "List the key slots", func(ctx context.Context, args []string) (err error) {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		s, err := a.open(ctx, &ref, &key, browsing)
		if err != nil {
			return err
		}
		defer closing(s, &err)
		info, err := s.Info()
		if err != nil {
			return err
		}
		list := slotList(info.KeySlots)
		if a.json {
			return a.printJSON(list)
		}
		if !info.Sealed {
			a.sayf("the store isn't sealed")
			return nil
		}
		rows := make([][]string, len(list))
		for i, k := range list {
			cost := ""
			if k.MemoryKiB > 0 {
				cost = fmt.Sprintf("argon2id, %s, t=%d, p=%d", roughSize(int64(k.MemoryKiB)<<10), k.Time, k.Parallelism)
			}
			rows[i] = []string{strconv.Itoa(k.ID), k.Type, printable(k.Label), cost}
		}
		return a.printTable([]string{"slot", "type", "label", "derivation"}, rows)
	})
	ref.flags(c)
	key.flags(c, "the ")
	return c
}

func (a *app) keyAddCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	next := keyFlags{prefix: "new-"}
	var params kdfFlags
	var label string
	c := a.verb("add IMAGE KEY NEW-KEY [--label L]", "Add a key that opens the store too", func(ctx context.Context, args []string) (err error) {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		argon, err := params.params()
		if err != nil {
			return err
		}
		// The new key first: see makeCredential.
		cred, err := next.credential(ctx, a, true)
		if err != nil {
			return err
		}
		if cred == nil {
			return usagef("no new key: --new-passphrase-file, --new-passphrase-fd, --new-key-file or --new-passphrase")
		}
		defer wipe(cred)
		s, err := a.open(ctx, &ref, &key, writing)
		if err != nil {
			return err
		}
		defer closing(s, &err)
		if err := a.demandSealed(ref.location, s.Info); err != nil {
			return err
		}
		id, err := s.Dir().AddKey(cred, &keyslot.Options{Label: label, Argon2: argon})
		if err != nil {
			return a.explain(&ref, err)
		}
		if a.json {
			return a.printJSON(map[string]int{"slot": id})
		}
		a.sayf("added key slot %d", id)
		return nil
	})
	c.Long = `Add a key that opens the store as the one given does. Both wrap the same
master key: nothing is encrypted anew.`
	ref.flags(c)
	key.flags(c, "the ")
	next.flags(c, "the new ")
	params.flags(c)
	c.Flags().StringVar(&label, "label", "", "a `LABEL` for the slot, readable without the key")
	return c
}

func (a *app) keyRmCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	var yes bool
	c := a.verb("rm IMAGE SLOT", "Remove a key slot", func(ctx context.Context, args []string) (err error) {
		args, err = ref.take(args, 1, 1, "one SLOT")
		if err != nil {
			return err
		}
		id, err := strconv.Atoi(args[0])
		if err != nil {
			return withHint(usage(fmt.Errorf("slot %q: a number", args[0])), "nvtool key ls IMAGE shows the slots")
		}
		s, err := a.open(ctx, &ref, &key, writing)
		if err != nil {
			return err
		}
		defer closing(s, &err)
		if err := a.demandSealed(ref.location, s.Info); err != nil {
			return err
		}
		if !yes && canAsk() && !confirm(a, fmt.Sprintf("Remove key slot %d of %s?", id, printable(ref.location))) {
			return withHint(fmt.Errorf("nothing was removed"), "--yes removes without asking")
		}
		if err := s.Dir().RemoveKey(id); err != nil {
			return a.explain(&ref, err)
		}
		a.warnf("whoever had this key may have kept the master key, and older copies, snapshots and backups of the image still open with it; only a new store, with the blobs put there, shuts them out")
		a.sayf("removed key slot %d", id)
		return nil
	})
	c.Long = `Remove a key slot; the last one stays. From then on this image doesn't open
with that key. Older copies and snapshots of it do.`
	ref.flags(c)
	key.flags(c, "the ")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "don't ask")
	return c
}

// demandSealed refuses to change the keys of a store that has none.
func (a *app) demandSealed(location string, info func() (*nvstore.Info, error)) error {
	in, err := info()
	if err != nil || in.Sealed {
		return err
	}
	return withHint(fmt.Errorf("%s: a plain store has no key slots: %w", location, image.ErrUnsupported),
		"make a sealed store with nvtool create and a key, and put the blobs there")
}

// confirm asks a question on the terminal.
func confirm(a *app, question string) bool {
	fmt.Fprintf(a.err, "%s [y/N] ", question)
	answer, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	return strings.EqualFold(strings.TrimSpace(answer), "y")
}
