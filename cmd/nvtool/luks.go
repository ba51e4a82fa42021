package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/raw"
)

func (a *app) luksCmd() *cobra.Command {
	c := group("luks", "Make and show LUKS encrypted images, and manage their key slots and headers",
		a.luksFormatCmd(), a.luksDumpCmd(), a.luksOpenCmd(),
		group("slot", "Add, change and remove the key slots of an encrypted image",
			a.luksSlotAddCmd(), a.luksSlotChangeCmd(), a.luksSlotRmCmd()),
		group("header", "Back up, restore and repair the header of an encrypted image",
			a.luksBackupCmd(), a.luksRestoreCmd(), a.luksRepairCmd()))
	c.Long = `LUKS versions 1 and 2, as cryptsetup and QEMU (version 1) know them.

IMAGE is a file that begins with a LUKS header. With -f qcow2 it is a qcow2
that is encrypted by itself (QEMU's encrypt.format=luks). With --header the
header lies in a file of its own, and IMAGE is the payload. Other stacks, as
LUKS over a qcow2, are given by --image-opts: driver=luks,file.driver=qcow2,
file.file.filename=IMAGE.`
	return c
}

// A luksRef is how the command line names an image with a LUKS header.
type luksRef struct {
	ref    imageRef
	header string
}

func (l *luksRef) flags(c *cobra.Command) {
	l.ref.flags(c)
	f := c.Flags().Lookup("format")
	f.Usage = "`FORMAT`: luks (default), or qcow2 for one that is encrypted by itself; with --header the payload's, raw or qcow2"
	c.Flags().StringVar(&l.header, "header", "", "`FILE` with the header, if it is detached from IMAGE")
	c.MarkFlagsMutuallyExclusive("image-opts", "header")
}

// take splits the arguments, and makes of --header a stack.
func (l *luksRef) take(args []string, min, max int, want string) ([]string, error) {
	rest, err := l.ref.take(args, min, max, want)
	if err != nil {
		return nil, err
	}
	switch {
	case l.header != "":
		l.ref.location, err = detachedStack(l.ref.location, l.ref.format, l.header)
		l.ref.format = ""
	case l.ref.opts != "" || l.ref.format != "":
	default:
		l.ref.format = chain.LUKS
	}
	if l.ref.format == chain.Raw {
		return nil, usagef("-f raw says that nothing is encrypted: luks, or qcow2")
	}
	return rest, err
}

// detachedStack is the location of a payload and its header.
func detachedStack(path, format, header string) (string, error) {
	double := func(s string) string { return strings.ReplaceAll(s, ",", ",,") }
	switch format {
	case "", chain.Raw:
		return "driver=luks,file.driver=file,file.filename=" + double(path) + ",header.driver=file,header.filename=" + double(header), nil
	case chain.QCOW2:
		return "driver=luks,file.driver=qcow2,file.file.filename=" + double(path) + ",header.driver=file,header.filename=" + double(header), nil
	}
	return "", usagef("-f %s with --header: the payload's format, raw or qcow2", format)
}

// withHeader opens the image with the header, and closes it after fn.
func (a *app) withHeader(l *luksRef, readOnly bool, fn func(h image.Device) error) (err error) {
	h, payload, err := chain.OpenHeader(l.ref.location, &chain.Options{Format: l.ref.format, ReadOnly: readOnly, Secret: l.ref.secrets.get})
	if err != nil {
		return a.explain(&l.ref, unencryptedHint(err))
	}
	defer func() {
		err = errors.Join(err, h.Close())
		if payload != nil && payload != h {
			err = errors.Join(err, payload.Close())
		}
	}()
	return a.explain(&l.ref, noHeaderHint(fn(h)))
}

func noHeaderHint(err error) error {
	if f := (*image.FormatError)(nil); errors.As(err, &f) && f.Kind == image.ErrFormat && strings.HasPrefix(f.Struct, "LUKS") {
		return withHint(err, "no LUKS header is there: nvtool luks dump IMAGE tells what is; --header FILE says that it is detached, and nvtool luks header restore puts a backup back")
	}
	return err
}

func unencryptedHint(err error) error {
	if f := (*image.FormatError)(nil); errors.As(err, &f) && f.Field == "crypt_method" {
		return withHint(err, "for LUKS over a qcow2 say --image-opts driver=luks,file.driver=qcow2,file.file.filename=IMAGE; nvtool luks dump IMAGE tells the kinds apart")
	}
	return err
}

// luksFacts is what dump, and format, print of an image.
type luksFacts struct {
	Image         string            `json:"image"`
	Format        string            `json:"format"` // "luks", "qcow2", "" if unknown
	Encryption    string            `json:"encryption"`
	UUID          string            `json:"uuid,omitempty"`
	Label         string            `json:"label,omitempty"`
	Cipher        string            `json:"cipher,omitempty"`
	Hash          string            `json:"hash,omitempty"`
	KeyBits       int               `json:"key_bits,omitempty"`
	SectorSize    int               `json:"sector_size,omitempty"`
	PayloadOffset *int64            `json:"payload_offset,omitempty"` // 0: detached
	PayloadSize   int64             `json:"payload_size,omitempty"`   // 0: to the image's end
	Sequence      uint64            `json:"sequence,omitempty"`
	Slots         []luksSlot        `json:"key_slots"`
	Tokens        map[string]string `json:"tokens,omitempty"`
	Damaged       string            `json:"damaged,omitempty"`
	VirtualSize   int64             `json:"virtual_size,omitempty"` // of a qcow2
	BackingFile   string            `json:"backing_file,omitempty"`
	Notes         []string          `json:"notes,omitempty"`
}

type luksSlot struct {
	Slot       int    `json:"slot"`
	KDF        string `json:"kdf"`
	Iterations uint64 `json:"iterations"`
	MemoryKiB  uint32 `json:"memory_kib,omitempty"`
	Lanes      int    `json:"lanes,omitempty"`
	Offset     int64  `json:"area_offset"`
	Size       int64  `json:"area_size"`
	Truncated  bool   `json:"truncated,omitempty"`
}

func luksFactsOf(name string, p *chain.Probe) *luksFacts {
	f := &luksFacts{Image: name, Format: p.Format, Encryption: p.Encryption, Slots: []luksSlot{}, Notes: p.Notes}
	if p.Damaged != nil {
		f.Damaged = p.Damaged.Error()
	}
	if p.QCOW2 != nil {
		f.VirtualSize, f.BackingFile = p.QCOW2.VirtualSize, p.QCOW2.BackingFile
	}
	if i := p.LUKS; i != nil {
		f.UUID, f.Label, f.Cipher, f.Hash, f.KeyBits, f.SectorSize = i.UUID, i.Label, i.Encryption, i.Hash, i.KeySize*8, i.SectorSize
		f.Sequence, f.Tokens = i.Seq, i.Tokens
		if p.Format == chain.LUKS {
			f.PayloadOffset, f.PayloadSize = &i.PayloadOffset, max(0, i.PayloadSize)
		}
		if i.Damaged != nil {
			f.Damaged = i.Damaged.Error()
		}
		for _, s := range i.Slots {
			f.Slots = append(f.Slots, luksSlot{s.Number, s.KDF, s.Iterations, s.MemoryKiB, s.Cpus, s.AreaOffset, s.AreaSize, s.Truncated})
		}
	}
	return f
}

func (a *app) luksDumpCmd() *cobra.Command {
	var l luksRef
	c := a.verb("dump IMAGE", "Tell how an image is encrypted, and show its LUKS header; needs no key", func(ctx context.Context, args []string) error {
		named := l.ref.opts != "" || l.header != ""
		if _, err := l.take(args, 0, 0, ""); err != nil {
			return err
		}
		if !named {
			return a.luksDumpFile(l.ref.location)
		}
		return a.withHeader(&l, true, func(h image.Device) error { return a.luksDump(l.ref.location, h) })
	})
	c.Long = `Tell LUKS1, LUKS2, a qcow2 that is encrypted by itself and qcow2's legacy
encryption apart, show the header and the key slots, and say what can't be
known without a key. A file that is named is read whatever its format: nothing
is opened on the word of what it says.`
	l.flags(c)
	return c
}

// luksDumpFile reads a file that may be held by a running machine.
func (a *app) luksDumpFile(path string) (err error) {
	d, err := raw.Open(path, &raw.Options{ReadOnly: true, NoLock: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return a.luksDump(path, d)
}

func (a *app) luksDump(name string, d image.Device) error {
	p, err := chain.Inspect(d)
	if err != nil {
		return err
	}
	f := luksFactsOf(name, p)
	if err := a.printLUKS(f); err != nil {
		return err
	}
	if p.Damaged != nil {
		return p.Damaged // what is shown isn't all there should be
	}
	return nil
}

func (a *app) printLUKS(f *luksFacts) error {
	if a.json {
		return a.printJSON(f)
	}
	or := func(s, empty string) string {
		if s == "" {
			return empty
		}
		return printable(s)
	}
	rows := [][]string{{"image", printable(f.Image)}, {"format", or(f.Format, "not known")}, {"encryption", or(f.Encryption, "not known")}}
	if f.Cipher != "" {
		rows = append(rows, []string{"uuid", printable(f.UUID)}, []string{"cipher", fmt.Sprintf("%s, key of %d bits", printable(f.Cipher), f.KeyBits)},
			[]string{"hash", printable(f.Hash)}, []string{"sector size", strconv.Itoa(f.SectorSize)})
	}
	if f.Label != "" {
		rows = append(rows, []string{"label", printable(f.Label)})
	}
	if f.PayloadOffset != nil {
		at := "detached from this header"
		if *f.PayloadOffset > 0 {
			at = roughSize(*f.PayloadOffset)
		}
		rows = append(rows, []string{"payload at", at})
	}
	if f.VirtualSize > 0 {
		rows = append(rows, []string{"virtual size", roughSize(f.VirtualSize)})
	}
	for _, s := range f.Slots {
		cost := fmt.Sprintf("%s, %d iterations", s.KDF, s.Iterations)
		if s.MemoryKiB > 0 {
			cost = fmt.Sprintf("%s, %s, t=%d, p=%d", s.KDF, roughSize(int64(s.MemoryKiB)<<10), s.Iterations, s.Lanes)
		}
		if s.Truncated {
			cost += ", the image ends inside its key area"
		}
		rows = append(rows, []string{fmt.Sprintf("key slot %d", s.Slot), printable(cost)})
	}
	for _, n := range slices.Sorted(maps.Keys(f.Tokens)) {
		rows = append(rows, []string{"token " + n, printable(f.Tokens[n])})
	}
	if f.Damaged != "" {
		rows = append(rows, []string{"damaged", printable(f.Damaged)})
	}
	for _, n := range f.Notes {
		rows = append(rows, []string{"note", n})
	}
	return a.printTable([]string{"fact", "value"}, rows)
}

func (a *app) luksOpenCmd() *cobra.Command {
	var l luksRef
	var test bool
	var slots []int
	c := a.verb("open IMAGE --test", "Try whether a passphrase opens an image", func(ctx context.Context, args []string) error {
		if _, err := l.take(args, 0, 0, ""); err != nil {
			return err
		}
		if !test {
			return withHint(usagef("nvtool maps no devices: --test tries a passphrase"),
				"the other verbs open an encrypted image by -f luks or --image-opts, with --secret-file; nvtool img convert decrypts it")
		}
		if err := l.ref.secrets.load(ctx, a, &l.ref); err != nil {
			return err
		}
		defer l.ref.secrets.wipe()
		return a.withHeader(&l, true, func(h image.Device) error { return a.luksTest(&l, h, slots) })
	})
	c.Long = `Try whether a passphrase opens an image, and say which key slot it opened. A
wrong one ends with exit code 11.`
	l.flags(c)
	c.Flags().BoolVar(&test, "test", false, "only try the passphrase")
	c.Flags().IntSliceVar(&slots, "slot", nil, "try only key slot `N`; may be given several times")
	return c
}

func (a *app) luksTest(l *luksRef, h image.Device, slots []int) error {
	pass, err := l.ref.passphrase()
	if err != nil {
		return err
	}
	defer clear(pass)
	n, err := luks.TestKey(h, &luks.Options{Passphrase: pass, Slots: slots, Path: l.ref.location})
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(map[string]int{"slot": n})
	}
	a.sayf("the passphrase opens key slot %d", n)
	return nil
}

// keySecret is the name of the topmost layer's secret.
func (r *imageRef) keySecret() string {
	if r.opts == "" {
		return ""
	}
	return chain.KeySecret(r.location)
}

// passphrase is the secret of the layer that a verb is about: the one without
// a name, or that of the topmost layer's key-secret.
func (r *imageRef) passphrase() ([]byte, error) {
	pass, err := r.secrets.get(r.keySecret())
	if err == nil && len(pass) == 0 {
		err = chain.ErrSecret
	}
	return pass, err
}

// newPassphrase is get for an image that is being made.
func (s *secretFlags) newPassphrase(ctx context.Context, name string) ([]byte, error) {
	before := s.prompt
	defer func() { s.prompt = before }()
	s.prompt = func(string) ([]byte, error) {
		if !canAsk() {
			return nil, withHint(usagef("no passphrase is given"), "--secret-file FILE, --secret-key-file FILE or --secret-fd N")
		}
		got, err := askSecret(ctx, "New passphrase: ", true)
		if err != nil {
			return nil, err
		}
		return got.Bytes(), nil
	}
	return s.get(name)
}

// exists tells whether a path is taken.
func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
