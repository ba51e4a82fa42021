package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/crypto/secret"
	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/nbd"
	"nvstore.dev/internal/qmp"
	"nvstore.dev/machine"
	"nvstore.dev/machine/live"
	"nvstore.dev/nvstore"
	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/swtpm"
	"nvstore.dev/tpmstate/vbox"
	"nvstore.dev/vpd"
	"nvstore.dev/vpd/edit"
)

// Errors of nvtool's own, for the table below.
var (
	errUsage   = errors.New("usage")
	errNoKey   = errors.New("the store is sealed, and no key was given")
	errInvalid = errors.New("invalid argument")
	errDamage  = errors.New("the check found damage")
	errLeaks   = errors.New("the check found leaks, and no damage")
	errVPD     = errors.New("not as its format asks")
	errDiffer  = errors.New("two images differ")
	errLost    = errors.New("the store isn't what was acknowledged")
)

// A kind is a class of errors that scripts can tell apart.
type kind struct {
	code  int
	name  string
	text  string // what it means, for the documentation
	is    func(error) bool
	hint  string
	wraps []error // of these kinds, if is is nil
}

// kinds is the table of exit codes. The first kind that fits an error counts.
var kinds = []kind{
	{code: 0, name: "ok", text: "done"},
	{code: 130, name: "interrupted", text: "stopped by SIGINT or SIGTERM; nothing is half-written", wraps: []error{context.Canceled}},
	{code: 2, name: "usage", text: "unknown verb or flag, wrong number of arguments", wraps: []error{errUsage},
		hint: "nvtool --help lists the verbs, and nvtool VERB --help shows what one takes"},
	{code: 26, name: "lost", text: "torture --verify: the store isn't what was acknowledged", wraps: []error{errLost},
		hint: "this is a bug in nvstore or a medium that lied about a flush; keep image and record"},
	{code: 13, name: "locked", text: "another process holds the image", wraps: []error{image.ErrLocked, live.ErrInUse, live.ErrWriters},
		hint: "stop the machine or tool that has the image open, or reach it through QEMU's NBD export"},
	{code: 21, name: "no-key", text: "the store is sealed or the image encrypted, and no key was given", wraps: []error{errNoKey, swtpm.ErrNoKey, chain.ErrSecret},
		hint: "give --passphrase-file, --passphrase-fd, --key-file, or --passphrase to be asked; for an encrypted image --secret-file or --secret-fd"},
	{code: 16, name: "tampered", text: "somebody without the key changed the store", wraps: []error{blobdir.ErrTampered},
		hint: "don't trust this image; compare it with a backup"},
	{code: 11, name: "wrong-key", text: "no key slot opens with the key given", wraps: []error{blobdir.ErrKey, swtpm.ErrKey, keyslot.ErrUnlock, luks.ErrPassphrase},
		hint: "nvtool key ls IMAGE shows which kinds of key the store has, nvtool luks dump IMAGE the key slots of an encrypted image"},
	{code: 25, name: "plain", text: "a key was given, and the store isn't sealed or the image not encrypted", wraps: []error{blobdir.ErrPlain, swtpm.ErrPlain, errUnencrypted, chain.ErrPlain},
		hint: "if you trust that the image was never replaced, leave the key out"},
	{code: 15, name: "reverted", text: "the image was reverted, or written by another, underneath; or a revert cut through a commit",
		wraps: []error{blobdir.ErrReverted, blobdir.ErrStraddled},
		hint:  "revert to the snapshot once more while nothing writes, or run the command again"},
	{code: 14, name: "no-space", text: "the image is full and can't grow, or the disk below it is full",
		wraps: []error{blobdir.ErrNoSpace, image.ErrNoSpace, syscall.ENOSPC, syscall.EDQUOT},
		hint:  "nvtool plan NAME=SIZE... says which size blobs need; nvtool rm makes room two commits later"},
	{code: 24, name: "truncated", text: "the image ends before its content does", is: truncated,
		hint: "the file was cut short, as by a copy that failed; copy it again"},
	{code: 23, name: "roots-damaged", text: "neither root can be read", is: hasRule("R13", "at least one readable root"),
		hint: "restore the image from a snapshot or backup"},
	{code: 22, name: "root-damaged", text: "the newest root is damaged; the generation before it can be read", is: hasRule("R71", ""),
		hint: "nvtool get --previous and nvtool ls --previous read the generation before; put them into a new store"},
	{code: 12, name: "corrupt", text: "damage: a checksum or a structure is wrong; or check found errors",
		wraps: []error{errDamage, errTPM, swtpm.ErrFormat, vbox.ErrFormat, blobdir.ErrCorrupt, image.ErrCorrupt, keyslot.ErrFormat},
		hint:  "nvtool check IMAGE lists what is damaged; nvtool get --previous reads the generation before"},
	{code: 20, name: "leaks", text: "check found leaks (wasted space), and no damage", wraps: []error{errLeaks},
		hint: "leaks are harmless, and usual after a crash; nvtool check --repair-leaks frees those of a qcow2"},
	{code: 27, name: "vpd", text: "a VPD spec or image is wrong", wraps: []error{errVPD, vpd.ErrSpec, vpd.ErrImage}},
	{code: 28, name: "differ", text: "vpd diff, tpm diff: the two differ", wraps: []error{errDiffer}},
	{code: 30, name: "attached", text: "a live extent is attached: an emulator may have it open", wraps: []error{blobdir.ErrAttached},
		hint: "when the machine is off, nvtool live detach IMAGE records what it wrote; nvtool get --unverified reads it as it is"},
	{code: 29, name: "server", text: "an NBD server, or QEMU over QMP, refused, broke the protocol, took too long or went away",
		wraps: []error{nbd.ErrRefused, nbd.ErrProtocol, nbd.ErrTLSRequired, nbd.ErrTimeout, nbd.ErrDisconnected, syscall.ECONNREFUSED,
			qmp.ErrRefused, qmp.ErrProtocol, qmp.ErrBusy, qmp.ErrTimeout, qmp.ErrDisconnected, live.ErrServer},
		hint: "check the URI, and that the server runs; nbdinfo --list URI shows what it exports"},
	{code: 18, name: "unsupported", text: "the image needs, or the command asks, what this version or format lacks",
		wraps: []error{blobdir.ErrUnsupported, image.ErrUnsupported, keyslot.ErrUnsupported, chain.ErrExternal, live.ErrDevice, errors.ErrUnsupported}},
	{code: 19, name: "format", text: "no store here, or the image's format isn't known", wraps: []error{blobdir.ErrFormat, image.ErrFormat, nvstore.ErrAmbiguous},
		hint: "nvtool create makes a store; give the image's format with -f qcow2 or -f raw if it has one"},
	{code: 17, name: "exists", text: "a blob, snapshot, image or file of that name is there already",
		wraps: []error{blobdir.ErrExist, image.ErrExist, fs.ErrExist}},
	{code: 10, name: "not-found", text: "no such blob, snapshot, key slot, machine, file or VPD field",
		wraps: []error{blobdir.ErrNotFound, live.ErrNode, edit.ErrNotFound, image.ErrNotFound, keyslot.ErrNotFound, luks.ErrNoSlot, fs.ErrNotExist}},
	{code: 3, name: "invalid", text: "a name, size, attribute, passphrase or number outside the limits",
		wraps: []error{errInvalid, live.ErrOther, machine.ErrInvalid, machine.ErrShrink, tpmstate.ErrVersion, tpmstate.ErrTooLarge, swtpm.ErrKeyFormat, blobdir.ErrInvalid, chain.ErrLocation, nbd.ErrURI, nbd.ErrKey, keyslot.ErrArgument, keyslot.ErrFull, keyslot.ErrLast, kdf.ErrParams,
			luks.ErrLastSlot, luks.ErrBudget, luks.ErrOther, secret.ErrEmpty, secret.ErrTooLong, secret.ErrKeyFile, secret.ErrMismatch}},
	{code: 1, name: "failed", text: "anything else", is: func(error) bool { return true }},
}

// kindOf finds an error's kind.
func kindOf(err error) *kind {
	for i := range kinds {
		k := &kinds[i]
		if k.is != nil && k.is(err) {
			return k
		}
		for _, w := range k.wraps {
			if errors.Is(err, w) {
				return k
			}
		}
	}
	return &kinds[len(kinds)-1]
}

// hasRule tells whether the store's reject rule and what it wanted are these.
func hasRule(rule, want string) func(error) bool {
	return func(err error) bool {
		e := (*blobdir.Error)(nil)
		return errors.As(err, &e) && e.Rule == rule && strings.Contains(e.Want, want)
	}
}

// truncated tells whether something was looked for behind the image's end.
func truncated(err error) bool {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, luks.ErrTruncated) {
		return true
	}
	const inside = "inside the image"
	if f := (*image.FormatError)(nil); errors.As(err, &f) && f.Kind == image.ErrCorrupt {
		return strings.Contains(f.Want, "inside the file")
	}
	e := (*blobdir.Error)(nil)
	if !errors.As(err, &e) {
		return false
	}
	switch e.Rule {
	case "R12", "R54": // roots, or the used area, behind the end
		return true
	case "R21":
		return strings.Contains(e.Want, inside)
	case "R13": // of either root
		return strings.Contains(fmt.Sprint(e.Got), inside)
	}
	return false
}

// A hinted error names the next step.
type hinted struct {
	error
	hint string
}

func (h *hinted) Unwrap() error { return h.error }

func withHint(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &hinted{err, hint}
}

func hintOf(err error) string {
	if h := (*hinted)(nil); errors.As(err, &h) {
		return h.hint
	}
	return kindOf(err).hint
}

func usage(err error) error { return &kinded{err, errUsage} }

func usagef(format string, args ...any) error {
	return usage(fmt.Errorf(format, args...))
}

func invalidf(format string, args ...any) error {
	return &kinded{fmt.Errorf(format, args...), errInvalid}
}

// A kinded error is of a kind without printing it.
type kinded struct {
	error
	kind error
}

func (k *kinded) Unwrap() []error { return []error{k.error, k.kind} }

// report prints an error and returns its exit code.
func (a *app) report(err error) int {
	if err == nil {
		return 0
	}
	k := *kindOf(err)
	if c := (*exitCoded)(nil); errors.As(err, &c) {
		k.code = c.code
	}
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	if k.name == "interrupted" {
		text = "interrupted"
	}
	if a.json {
		enc := json.NewEncoder(a.err)
		enc.SetEscapeHTML(false)
		enc.Encode(struct {
			Error string `json:"error"`
			Code  int    `json:"code"`
			Kind  string `json:"kind"`
			Hint  string `json:"hint,omitempty"`
		}{text, k.code, k.name, hintOf(err)})
		return k.code
	}
	fmt.Fprintf(a.err, "nvtool: error: %s\n", text)
	if hint := hintOf(err); hint != "" {
		fmt.Fprintf(a.err, "nvtool: hint: %s\n", hint)
	}
	return k.code
}

// exitCodesHelp is the topic "nvtool help exit-codes".
func exitCodesHelp() *cobra.Command {
	var b strings.Builder
	b.WriteString("nvtool's exit codes. A code that isn't listed is a failure too.\n\n")
	for code := range 131 {
		for _, k := range kinds {
			if k.code == code {
				fmt.Fprintf(&b, "  %3d  %-14s %s\n", k.code, k.name, k.text)
			}
		}
	}
	b.WriteString("\nWith --json an error is an object on standard error: {\"error\", \"code\", \"kind\", \"hint\"}.")
	return &cobra.Command{Use: "exit-codes", Short: "What nvtool's exit codes mean", Long: b.String()}
}
