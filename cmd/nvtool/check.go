package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/nvstore"
)

func (a *app) checkCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	var repair bool
	c := a.verb("check IMAGE [--repair-leaks]", "Read everything, and report damage, leaks and oddities", func(ctx context.Context, args []string) error {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		return a.check(ctx, &ref, &key, repair)
	})
	c.Long = `Read everything that the store reaches, compare every checksum and, with the
key, every MAC and tag; compare what is free with what is in use; and check the
qcow2 image below. Nothing is changed, unless --repair-leaks gives back what a
crash left allocated in the qcow2 image; that is all it does.

Exit code 0: clean, though there may be warnings. 12: errors. 20: leaks only.`
	ref.flags(c)
	key.flags(c, "the ")
	ref.snapshotFlag(c)
	c.Flags().BoolVar(&repair, "repair-leaks", false, "first give back the clusters of a qcow2 image that nothing uses")
	return c
}

func (a *app) check(ctx context.Context, ref *imageRef, key *keyFlags, repair bool) (err error) {
	if repair && ref.snapshot != "" {
		return usagef("--repair-leaks changes the image: leave out --snapshot")
	}
	cred, done, err := a.keys(ctx, ref, key, false)
	if err != nil {
		return err
	}
	defer done()
	dev, err := a.device(ref, !repair)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	if repair {
		if err := a.repairLeaks(ctx, ref, dev, cred); err != nil {
			return a.explain(ref, err)
		}
	}
	rep := &nvstore.Report{Errors: []blobdir.Problem{}, Leaks: []blobdir.Problem{}, Warnings: []blobdir.Problem{}}
	if ref.snapshot == "" { // the qcow2 is checked as a whole
		if err := checkBelow(ctx, dev, rep); err != nil {
			return a.explain(ref, err)
		}
	}
	broken := a.checkStore(ctx, dev, ref, cred, rep)
	if broken != nil && !isDamage(broken) {
		return a.explain(ref, broken)
	}
	if err := a.printReport(ref, rep); err != nil {
		return err
	}
	switch {
	case broken != nil: // the store can't be opened
		return a.explain(ref, broken)
	case len(rep.Errors) > 0:
		return fmt.Errorf("%s: %w: %s", ref.location, errDamage, count(int64(len(rep.Errors)), "error"))
	case len(rep.Leaks) > 0:
		return fmt.Errorf("%s: %w: %s", ref.location, errLeaks, count(int64(len(rep.Leaks)), "leak"))
	}
	return nil
}

// repairLeaks frees clusters of the qcow2 image below a store.
func (a *app) repairLeaks(ctx context.Context, ref *imageRef, dev image.Device, cred *keyslot.Credential) error {
	im, ok := image.As[*qcow2.Image](dev)
	if !ok {
		return withHint(fmt.Errorf("repairing leaks of a %s image: %w", formatOf(dev), image.ErrUnsupported), "only qcow2 images have leaks that nvtool frees")
	}
	// An image without a store isn't ours to change.
	if err := peek(dev, ref, cred, func(*nvstore.Store) error { return nil }); err != nil {
		return err
	}
	res, err := im.RepairLeaks(ctx)
	if err == nil && res.Leaks > 0 {
		a.sayf("%s: gave %s back", printable(ref.location), count(res.Leaks, "cluster"))
	}
	return err
}

// isDamage tells what check reports from what keeps it from checking.
func isDamage(err error) bool {
	for _, k := range []error{blobdir.ErrCorrupt, blobdir.ErrTampered, blobdir.ErrStraddled} {
		if errors.Is(err, k) {
			return true
		}
	}
	return false
}

// checkBelow checks the qcow2 image, if the store lies in one.
func checkBelow(ctx context.Context, dev image.Device, rep *nvstore.Report) error {
	im, ok := image.As[*qcow2.Image](dev)
	if !ok {
		return nil
	}
	res, err := im.Check(ctx, nil)
	if err != nil {
		return fmt.Errorf("checking the qcow2 image: %w", err)
	}
	if n := unencrypted(im, res); n > 0 {
		rep.Warnings = append(rep.Warnings, blobdir.Problem{Code: "qcow2-unencrypted", Where: "qcow2", Message: plainClusters(n)})
	}
	for _, f := range res.Findings {
		where := "qcow2"
		if f.Where >= 0 {
			where = fmt.Sprintf("qcow2 at byte %#x of the file", f.Where)
		}
		p := blobdir.Problem{Code: "qcow2-" + f.Code, Where: where, Message: f.Message}
		if f.Error {
			rep.Errors = append(rep.Errors, p)
		} else {
			rep.Leaks = append(rep.Leaks, p)
		}
	}
	return nil
}

// checkStore adds what is wrong with the store. An error of a kind that
// isDamage knows is in the report too.
func (a *app) checkStore(ctx context.Context, dev image.Device, ref *imageRef, cred *keyslot.Credential, rep *nvstore.Report) error {
	err := peek(dev, ref, cred, func(s *nvstore.Store) error {
		a.warnStatus(s)
		bar := a.bar("check", 1)
		defer bar.end()
		r, err := s.Check(ctx, bar.set)
		if err != nil {
			return err
		}
		rep.Errors = append(rep.Errors, r.Errors...)
		rep.Leaks = append(rep.Leaks, r.Leaks...)
		rep.Warnings = append(rep.Warnings, r.Warnings...)
		rep.Generation, rep.Blobs, rep.Bytes, rep.Keyless = r.Generation, r.Blobs, r.Bytes, r.Keyless
		return nil
	})
	if !isDamage(err) {
		return err
	}
	p := blobdir.Problem{Code: "damage", Where: "store", Message: err.Error()}
	if e := (*blobdir.Error)(nil); errors.As(err, &e) {
		if e.Rule != "" {
			p.Code = e.Rule
		}
		if p.Where = e.Struct; e.Off >= 0 {
			p.Where += fmt.Sprintf(" at byte %#x", e.Off)
		}
	}
	rep.Errors = append(rep.Errors, p)
	return err
}

func (a *app) printReport(ref *imageRef, rep *nvstore.Report) error {
	if rep.Keyless {
		a.warnf("the store is sealed and no key was given: checksums were checked, authenticity was not")
	}
	if a.json {
		return a.printJSON(rep)
	}
	for _, list := range []struct {
		name     string
		problems []blobdir.Problem
	}{{"error", rep.Errors}, {"leak", rep.Leaks}, {"warning", rep.Warnings}} {
		for _, p := range list.problems {
			text := strings.TrimSuffix(p.Message, " ("+p.Code+")")
			if !strings.Contains(text, " at byte ") { // it says where
				text = p.Where + ": " + text
			}
			fmt.Fprintf(a.out, "%s: %s: %s\n", list.name, p.Code, printable(text))
		}
	}
	a.sayf("%s: generation %d, %s, %s checked: %s, %s, %s", printable(ref.location), rep.Generation,
		count(rep.Blobs, "blob"), roughSize(rep.Bytes), count(int64(len(rep.Errors)), "error"),
		count(int64(len(rep.Leaks)), "leak"), count(int64(len(rep.Warnings)), "warning"))
	return nil
}
