package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/qcow2"
)

// qemu-img check's exit codes.
const (
	checkFailed      = 1
	checkCorrupt     = 2
	checkLeaks       = 3
	checkUnsupported = 63
)

func (a *app) imgCheckCmd() *cobra.Command {
	var ref imgRef
	var repair string
	var data bool
	c := a.verb("check IMAGE [-r leaks|all]", "Check a qcow2 image's metadata, and repair it", func(ctx context.Context, args []string) error {
		_, err := ref.take(args, 0, 0, "")
		if err == nil {
			err = a.imgCheck(ctx, &ref, repair, data)
		}
		return checkCoded(err)
	})
	c.Long = `Compare reference counts with references and look for what the format doesn't
allow. -r leaks gives back clusters that nothing uses; -r all also puts right
what has one meaning, and makes reference counts anew. A crash during a repair
leaves the image no worse than before.

The exit codes are qemu-img's. 0: no errors. 1: the check couldn't be done.
2: errors. 3: leaks, and no errors. 63: the format has nothing to check.`
	ref.flags(c)
	ref.shareFlag(c)
	a.outputFlag(c)
	c.Flags().StringVarP(&repair, "repair", "r", "", "repair `WHAT`: leaks or all")
	c.Flags().BoolVar(&data, "data", false, "unpack every compressed cluster too")
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return checkCoded(usage(err)) })
	return c
}

// checkCoded gives an error the exit code that it has in qemu-img check.
func checkCoded(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errDamage):
		return &exitCoded{err, checkCorrupt}
	case errors.Is(err, errLeaks):
		return &exitCoded{err, checkLeaks}
	case errors.Is(err, errNoCheck):
		return &exitCoded{err, checkUnsupported}
	}
	return &exitCoded{err, checkFailed}
}

var errNoCheck = fmt.Errorf("the format has nothing to check: %w", image.ErrUnsupported)

// checkFacts are qemu-img check's.
type checkFacts struct {
	Filename string `json:"filename"`
	Format   string `json:"format"`
	*qcow2.CheckResult
}

func (a *app) imgCheck(ctx context.Context, ref *imgRef, repair string, data bool) (err error) {
	if repair != "" && repair != "leaks" && repair != "all" {
		return usagef("-r %s: leaks or all", repair)
	}
	facts := &checkFacts{Filename: ref.location, Format: "qcow2"}
	if facts.CheckResult, err = a.checked(ctx, ref, repair, &qcow2.CheckOptions{Data: data}); err != nil {
		return a.explain(&ref.imageRef, err)
	}
	if err := a.printCheck(facts); err != nil {
		return err
	}
	switch {
	case facts.CheckErrors > 0:
		return fmt.Errorf("%s: %s kept parts from being checked", ref.location, count(facts.CheckErrors, "error"))
	case facts.Errors > 0:
		return withHint(fmt.Errorf("%s: %w: %s", ref.location, errDamage, count(facts.Errors, "error")),
			"restore the image from a backup, or repair a copy of it with -r all")
	case facts.Leaks > 0:
		return withHint(fmt.Errorf("%s: %w: %s", ref.location, errLeaks, count(facts.Leaks, "leaked cluster")),
			"leaks are harmless; nvtool img check -r leaks gives them back")
	}
	return nil
}

// checked checks, and before that repairs, an image.
func (a *app) checked(ctx context.Context, ref *imgRef, repair string, o *qcow2.CheckOptions) (_ *qcow2.CheckResult, err error) {
	if repair != "" {
		if err := ref.secrets.load(ctx, a, &ref.imageRef); err != nil {
			return nil, err
		}
		defer ref.secrets.wipe()
		file, path, err := chain.OpenBelow(ref.location, &chain.Options{Format: ref.format, Secret: ref.secrets.get})
		if errors.Is(err, image.ErrUnsupported) || ref.format == "raw" {
			err = errors.Join(errNoCheck, err)
		}
		if err != nil {
			return nil, err
		}
		defer closeAll(&err, file)
		return qcow2.Repair(ctx, file, &qcow2.RepairOptions{LeaksOnly: repair == "leaks", Check: *o, Path: path})
	}
	dev, err := a.openImg(ctx, ref, true)
	if err != nil {
		return nil, err
	}
	defer closeAll(&err, dev)
	im, ok := image.As[*qcow2.Image](dev)
	if !ok {
		return nil, fmt.Errorf("%s: %w", formatOf(dev), errNoCheck)
	}
	res, err := im.Check(ctx, o)
	if err == nil && unencrypted(im, res) > 0 {
		a.warnf("%s: %s", printable(ref.location), plainClusters(res.Compressed))
	}
	return res, err
}

func (a *app) printCheck(f *checkFacts) error {
	if a.json {
		return a.printJSON(f)
	}
	for _, x := range f.Fixed {
		a.sayf("repaired: %s%s: %s", x.Code, place(&x), printable(x.Message))
	}
	for _, x := range f.Findings {
		kind := "leak"
		if x.Error {
			kind = "error"
		}
		fmt.Fprintf(a.out, "%s: %s%s: %s\n", kind, x.Code, place(&x), printable(x.Message))
	}
	if f.LeaksFixed+f.ErrorsFixed > 0 {
		a.sayf("repaired %s, gave %s back", count(f.ErrorsFixed, "error"), count(f.LeaksFixed, "leaked cluster"))
	}
	if f.Errors+f.Leaks == 0 {
		a.sayf("No errors were found on the image.")
	} else {
		a.sayf("%s, %s", count(f.Errors, "error"), count(f.Leaks, "leaked cluster"))
	}
	if f.Total > 0 && f.Allocated > 0 {
		per := func(n, of int64) float64 { return 100 * float64(n) / float64(of) }
		a.sayf("%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters", f.Allocated, f.Total,
			per(f.Allocated, f.Total), per(f.Fragmented, f.Allocated), per(f.Compressed, f.Allocated))
	}
	a.sayf("Image end offset: %d", f.ImageEnd)
	return nil
}

func place(x *qcow2.Finding) string {
	if x.Where < 0 {
		return ""
	}
	return fmt.Sprintf(" at byte %#x", x.Where)
}
