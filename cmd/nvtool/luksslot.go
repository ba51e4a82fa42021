package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"nvstore.dev/crypto/secret"
	"nvstore.dev/image"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/raw"
)

// newSecret is where a new passphrase comes from.
type newSecret struct {
	file, keyFile string
	fd            int
	prompt        bool
}

func (n *newSecret) flags(c *cobra.Command) {
	const prefix, what = "new-", "the new "
	f := c.Flags()
	f.StringVar(&n.file, prefix+"secret-file", "", "`FILE` with "+what+"passphrase; one newline at its end isn't part of it")
	f.StringVar(&n.keyFile, prefix+"secret-key-file", "", "`FILE` of any bytes, all of which are "+what+"passphrase")
	f.IntVar(&n.fd, prefix+"secret-fd", -1, "file descriptor `N` to read "+what+"passphrase from")
	f.BoolVar(&n.prompt, prefix+"secret", false, "ask for "+what+"passphrase on the terminal")
	c.MarkFlagsMutuallyExclusive(prefix+"secret-file", prefix+"secret-key-file", prefix+"secret-fd", prefix+"secret")
}

// read returns the passphrase; it asks if no flag says otherwise.
func (n *newSecret) read(ctx context.Context, a *app) (*secret.Secret, error) {
	var s *secret.Secret
	var err error
	switch {
	case n.file != "":
		a.warnExposed(n.file)
		s, err = secret.ReadFile(n.file)
	case n.keyFile != "":
		a.warnExposed(n.keyFile)
		s, err = secret.ReadBlob(n.keyFile)
	case n.fd >= 0:
		s, err = secret.ReadFD(n.fd)
	case n.prompt || canAsk():
		return askSecret(ctx, "New passphrase: ", true)
	default:
		return nil, withHint(usagef("no new passphrase is given"), "--new-secret-file FILE, --new-secret-key-file FILE, --new-secret-fd N, or --new-secret to be asked")
	}
	if err != nil {
		return nil, fmt.Errorf("reading the secret: %w", err)
	}
	return s, nil
}

// slotKDF says how hard a new passphrase of a key slot is to guess.
type slotKDF struct {
	kdf        kdfFlags
	pbkdf      string
	iterations uint32
}

func (k *slotKDF) flags(c *cobra.Command) {
	k.kdf.flags(c)
	c.Flags().StringVar(&k.pbkdf, "pbkdf", "argon2id", "derivation of LUKS2's keys, `NAME` argon2id or pbkdf2; LUKS1 has pbkdf2 alone")
	c.Flags().Uint32Var(&k.iterations, "iterations", 0, "of PBKDF2, 1000 or more (default 600000)")
}

func (k *slotKDF) options(pass []byte) (*luks.KeyOptions, error) {
	if k.pbkdf != "argon2id" && k.pbkdf != "pbkdf2" {
		return nil, usagef("--pbkdf %q: argon2id or pbkdf2", k.pbkdf)
	}
	argon, err := k.kdf.params()
	if err != nil {
		return nil, err
	}
	return &luks.KeyOptions{NewPassphrase: pass, PBKDF2: k.pbkdf == "pbkdf2", Iterations: k.iterations, Argon2id: argon}, nil
}

// luksKeyVerb makes slot add and slot change.
func (a *app) luksKeyVerb(use, short, long, done string, fn func(image.Device, *luks.KeyOptions) (int, error)) *cobra.Command {
	var l luksRef
	var next newSecret
	var k slotKDF
	c := a.verb(use, short, func(ctx context.Context, args []string) error {
		if _, err := l.take(args, 0, 0, ""); err != nil {
			return err
		}
		if err := l.ref.secrets.load(ctx, a, &l.ref); err != nil {
			return err
		}
		defer l.ref.secrets.wipe()
		s, err := next.read(ctx, a)
		if err != nil {
			return err
		}
		defer s.Wipe()
		o, err := k.options(s.Bytes())
		if err != nil {
			return err
		}
		return a.withHeader(&l, false, func(h image.Device) error {
			if o.Passphrase, err = l.ref.passphrase(); err != nil {
				return err
			}
			defer clear(o.Passphrase)
			n, err := fn(h, o)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]int{"slot": n})
			}
			a.sayf(done, n)
			return nil
		})
	})
	c.Long = long
	l.flags(c)
	next.flags(c)
	k.flags(c)
	return c
}

func (a *app) luksSlotAddCmd() *cobra.Command {
	return a.luksKeyVerb("add IMAGE --secret-file OLD --new-secret-file NEW", "Add a passphrase that opens the image too",
		`Fill a free key slot, so that another passphrase opens the image too. A crash
leaves the slots as they were, or with the new one.`, "added key slot %d", luks.AddKey)
}

func (a *app) luksSlotChangeCmd() *cobra.Command {
	return a.luksKeyVerb("change IMAGE --secret-file OLD --new-secret-file NEW", "Change a passphrase",
		`Fill a free key slot with the new passphrase, and then remove the one that the
old passphrase opens: after a crash the old one, the new one, or both open the
image. Older copies, snapshots and header backups go on opening with the old.`, "the passphrase is now in key slot %d", luks.ChangeKey)
}

func (a *app) luksSlotRmCmd() *cobra.Command {
	var l luksRef
	var yes bool
	c := a.verb("rm IMAGE SLOT", "Remove a key slot", func(ctx context.Context, args []string) error {
		args, err := l.take(args, 1, 1, "one SLOT")
		if err != nil {
			return err
		}
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return withHint(usage(fmt.Errorf("slot %q: a number", args[0])), "nvtool luks dump IMAGE shows the slots")
		}
		if err := l.ref.secrets.load(ctx, a, &l.ref); err != nil {
			return err
		}
		defer l.ref.secrets.wipe()
		if !yes && canAsk() && !confirm(a, fmt.Sprintf("Remove key slot %d of %s?", n, printable(l.ref.location))) {
			return withHint(fmt.Errorf("nothing was removed"), "--yes removes without asking")
		}
		if err := a.withHeader(&l, false, func(h image.Device) error { return luks.RemoveKey(h, n) }); err != nil {
			return err
		}
		a.warnf("older copies, snapshots and header backups of the image still open with this passphrase")
		a.sayf("removed key slot %d", n)
		return nil
	})
	c.Long = `Remove a key slot and overwrite its key area. It needs no passphrase. The last
slot in use stays: without one nothing opens the image.`
	l.flags(c)
	c.Flags().BoolVarP(&yes, "yes", "y", false, "don't ask")
	return c
}

func (a *app) luksBackupCmd() *cobra.Command {
	var l luksRef
	var output string
	c := a.verb("backup IMAGE -o FILE", "Copy header and key slots into a file", func(ctx context.Context, args []string) error {
		if _, err := l.take(args, 0, 0, ""); err != nil {
			return err
		}
		if output == "" {
			return usagef("no -o FILE for the backup")
		}
		if err := l.ref.secrets.load(ctx, a, &l.ref); err != nil {
			return err
		}
		defer l.ref.secrets.wipe()
		err := a.withHeader(&l, true, func(h image.Device) error {
			return a.writeOutput(output, func(w io.Writer) error { return luks.BackupHeader(h, w) })
		})
		if err == nil && output != "-" {
			a.sayf("%s: header and key slots of %s", printable(output), printable(l.ref.location))
		}
		return err
	})
	c.Long = `Copy header and key slots into a file, as cryptsetup luksHeaderBackup does. If
the image's header is lost, the copy and a passphrase of its time are all that
opens the image. Whoever has both can open it for ever.`
	l.flags(c)
	c.Flags().StringVarP(&output, "output", "o", "", "the `FILE`; - is standard output")
	return c
}

func (a *app) luksRestoreCmd() *cobra.Command {
	var l luksRef
	var force bool
	c := a.verb("restore IMAGE FILE", "Put a header backup in place of an image's header", func(ctx context.Context, args []string) (err error) {
		args, err = l.take(args, 1, 1, "one FILE")
		if err != nil {
			return err
		}
		if err := l.ref.secrets.load(ctx, a, &l.ref); err != nil {
			return err
		}
		defer l.ref.secrets.wipe()
		b, err := raw.Open(args[0], &raw.Options{ReadOnly: true})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, b.Close()) }()
		err = a.withHeader(&l, false, func(h image.Device) error { return luks.RestoreHeader(h, b, force) })
		if errors.Is(err, luks.ErrOther) {
			return withHint(err, "compare nvtool luks dump IMAGE and nvtool luks dump FILE; --force restores over a header that can't be read, or of another UUID")
		}
		if err != nil {
			return err
		}
		a.sayf("%s has the header of %s; passphrases that were changed since then are the old ones again", printable(l.ref.location), printable(args[0]))
		return nil
	})
	c.Long = `Put a header backup in place of an image's header and key slots. The image's
header must be readable and have the backup's UUID, unless --force is given; a
readable one that says another place or cipher for the payload is never
replaced. After an interruption run it again.`
	l.flags(c)
	c.Flags().BoolVar(&force, "force", false, "replace also a header that can't be read, or has another UUID")
	return c
}

func (a *app) luksRepairCmd() *cobra.Command {
	var l luksRef
	c := a.verb("repair IMAGE", "Make a damaged LUKS2 header anew from the other one", func(ctx context.Context, args []string) error {
		if _, err := l.take(args, 0, 0, ""); err != nil {
			return err
		}
		if err := l.ref.secrets.load(ctx, a, &l.ref); err != nil {
			return err
		}
		defer l.ref.secrets.wipe()
		return a.withHeader(&l, false, func(h image.Device) error {
			repaired, err := luks.RepairHeader(h)
			switch {
			case err != nil:
				return err
			case a.json:
				return a.printJSON(map[string]bool{"repaired": repaired})
			case repaired:
				a.sayf("the damaged header was made anew from the other one")
			default:
				a.sayf("there was nothing to repair")
			}
			return nil
		})
	})
	c.Long = `LUKS2 has its header twice. If one is damaged or older, the image opens with the
other; this makes both the same again. LUKS1 has one header: see backup.`
	l.flags(c)
	return c
}
