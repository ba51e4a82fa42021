package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/nvstore/fusefs"
)

type serveFUSE struct {
	daemon
	ref                  imageRef
	key                  keyFlags
	readOnly, allowOther bool
}

func (a *app) serveFUSECmd() *cobra.Command {
	o := &serveFUSE{daemon: daemon{app: a}}
	c := a.verb("fuse IMAGE DIR", "Show blobs as files in a folder", o.run)
	c.Long = `Show blobs as files in DIR, until it is unmounted (umount, fusermount3 -u) or
SIGTERM or SIGINT comes. fsync, msync and close are commits; creating, removing
and renaming are durable at once. What was written is never lost by unmounting.
A blob a/b is the file b in the folder a; names that a store can't have are
refused. Modes, owners and empty folders last as long as the mount.`
	c.Example = `  nvtool serve fuse vm.qcow2 /run/vm/nv &
  swtpm socket --tpm2 --tpmstate dir=/run/vm/nv/tpm ...
  fusermount3 -u /run/vm/nv`
	o.ref.flags(c)
	o.key.flags(c, "the ")
	f := c.Flags()
	f.BoolVarP(&o.readOnly, "read-only", "r", false, "mount, and open the image, for reading")
	f.BoolVar(&o.allowOther, "allow-other", false, "let other users in")
	f.StringVar(&o.pidFile, "pid-file", "", "write the process ID to `FILE` when the folder is there")
	return c
}

func (o *serveFUSE) run(ctx context.Context, args []string) (err error) {
	args, err = o.ref.take(args, 1, 1, "one DIR")
	if err != nil {
		return err
	}
	if info, err := os.Stat(args[0]); err != nil {
		return withHint(err, "DIR must be a folder that is there already")
	} else if !info.IsDir() {
		return &fs.PathError{Op: "mount", Path: args[0], Err: errNoFolder}
	}
	acc := serving
	if o.readOnly {
		acc = reading
	}
	s, err := o.open(ctx, &o.ref, &o.key, acc)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	m, err := fusefs.New(args[0], s, &fusefs.Options{ReadOnly: o.readOnly, AllowOther: o.allowOther})
	if errors.Is(err, image.ErrUnsupported) {
		err = withHint(err, "rename one of them with nvtool mv")
	}
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		ended <- m.Wait()
		close(stop)
	}()
	undo, err := o.ready()
	if err == nil && o.json {
		err = o.printJSON(map[string]any{"dir": args[0], "pid": os.Getpid()})
	} else if err == nil {
		o.sayf("%s", args[0])
	}
	if err != nil {
		return errors.Join(err, o.unmount(m, stop), <-ended)
	}
	select {
	case <-stop:
	case <-ctx.Done():
		if err := o.unmount(m, stop); err != nil {
			return err
		}
	}
	return errors.Join(<-ended, undo())
}

var errNoFolder = &kinded{errors.New("not a folder"), errInvalid}

// unmount goes on trying while programs use the folder.
func (o *serveFUSE) unmount(m *fusefs.Mount, stop <-chan struct{}) error {
	for said := false; ; said = true {
		err := m.Unmount()
		if err == nil {
			return nil
		}
		if !said {
			o.warnf("the folder is in use, and is unmounted when it isn't any more: %v", printable(fmt.Sprint(err)))
		}
		select {
		case <-stop:
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}
