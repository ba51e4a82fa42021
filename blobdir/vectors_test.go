package blobdir_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
)

// Every vector has one fault, in a store that is otherwise right: checksums,
// MACs and the settled record are made anew, so that the fault is what the
// reader meets.

var updateFixtures = flag.Bool("update", false, "write ../fixtures/damaged and ../fixtures/golden anew")

// Where a vector's fault must show.
const (
	atOpen  = "open"  // Open fails
	atWrite = "write" // Open fails, unless read-only
	atRead  = "read"  // Open succeeds, List or Get fails, Check reports
	atCheck = "check" // only Check reports
	atSlot  = "slot"  // the root is void: Check reports; if it is settled, Open fails by R71
	atNote  = "note"  // nothing fails; Status and a warning of Check tell
	atAny   = "any"   // an error or a note somewhere
	atNone  = "none"  // legal: no errors
)

type vector struct {
	name  string
	rule  string
	where string
	kind  error
	only  string // kinds of stores; all if empty
	fault func(f *forgery)
}

// base makes the good store of the vectors.
func base(t testing.TB, kind string) []byte {
	dev := &flat{make([]byte, 256<<10)}
	d, err := blobdir.Create(dev, createOptions(t, kind))
	require.NoError(t, err)
	meta := func(chunk int) *blobdir.Meta {
		return &blobdir.Meta{Type: "test", Writer: "vectors 1", ChunkSize: chunk, Attributes: []blobdir.Attribute{{Key: "a", Value: "1"}, {Key: "b", Value: "2"}}}
	}
	text := func(n int) []byte { return bytes.Repeat([]byte("nvstore "), n/8+1)[:n] }
	require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
		return errors.Join(tx.Put("empty", nil, nil), tx.Put("net0/nvm", text(5000), meta(4096)),
			tx.Put("uefi/vars", text(9000), meta(8192)), tx.Put("tpm/permanent", text(22000), meta(4096)))
	}, nil))
	for i := range 3 { // so that there is free space of several ages
		require.NoError(t, put(d, "net0/nvm", text(5001+i)))
	}
	require.NoError(t, d.Close())
	return dev.p
}

// grown is base with trees of two levels, made by hand: the directory, the
// chunk map and the free space each get a second leaf.
func grown(t testing.TB, img []byte) *forgery {
	f := takeApart(t, img, rawKey)
	f.split(f.dir, "directory")
	for _, e := range f.entries() {
		if e.has("chunkMap") {
			f.split(e.at("chunkMap").to, "chunk map")
		}
	}
	gen := f.body().at("generation").int()
	free := f.free.el
	moved := slices.Clone(free.at("extents").kids[:2])
	free.at("extents").kids = free.at("extents").kids[2:]
	leaf := f.place(&extent{kind: "free tree", el: derSeq(0x30, oidEl("1.8"), derInt(0), derSeq(0x30, moved...)).named(nodeFields...)})
	free.add(f.reference(0xa0, leaf, gen))
	f.free.kids = append(f.free.kids, leaf)
	return takeApart(t, f.reseal(), rawKey)
}

// split turns a leaf that is a tree's root into two leaves below a new root,
// all on new blocks.
func (f *forgery) split(x *extent, kind string) {
	gen := x.ref.at("generation").int()
	items := x.el.at("items").kids
	oid := x.el.at("type")
	top := derSeq(0x30)
	halves := [][]*el{items[:len(items)/2], items[len(items)/2:]}
	kids := x.kids
	x.kids = nil
	for _, h := range halves {
		leaf := f.place(&extent{kind: kind, el: derSeq(0x30, oid, derInt(0), derSeq(0x30, h...)).named(nodeFields...)})
		for _, k := range kids {
			if slices.ContainsFunc(h, func(e *el) bool { return e.contains(k.ref) }) {
				leaf.kids = append(leaf.kids, k)
			}
		}
		x.kids = append(x.kids, leaf)
		top.add(derSeq(0x30, h[0].kids[0].clone(), f.reference(0x30, leaf, gen)).named("key", "node"))
	}
	x.el = derSeq(0x30, oid, derInt(1), top).named(nodeFields...)
	f.move(x)
}

// move puts an extent on new blocks and frees the old ones.
func (f *forgery) move(x *extent) {
	free := f.free.el.at("extents")
	at := slices.IndexFunc(free.kids, func(e *el) bool { return e.at("offset").int() > x.off })
	if at < 0 {
		at = len(free.kids)
	}
	n := (x.ref.at("length").int() + 4095) &^ 4095
	free.insert(at, derSeq(0x30, derInt(x.off), derInt(n), f.body().at("generation")).named("offset", "length", "freed"))
	f.place(x)
	x.ref.at("offset").val = derInt(x.off).val
}

func (e *el) contains(x *el) bool {
	return e == x || slices.ContainsFunc(e.kids, func(k *el) bool { return k.contains(x) })
}

// oidEl is an object identifier below our arc.
func oidEl(last string) *el {
	var a, b byte
	fmt.Sscanf(last, "%d.%d", &a, &b)
	return derBytes(6, append(slices.Clone(arcDER), a, b))
}

// arcDER is the content of the arc, as FORMAT.md section 3 prints it.
var arcDER = []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x14, 0x01, 0xbe, 0x40, 0x93, 0x7a, 0x83, 0xfa, 0x31, 0x81, 0xc9, 0x7d,
	0xc3, 0x32, 0x81, 0x8a, 0x7d, 0x82, 0xc8, 0x6f, 0xb0, 0xc0, 0x77, 0x87, 0x93, 0xe3, 0x44}

// A finding is what a reader met.
type finding struct {
	stage string
	rule  string
	kind  error
	text  string
}

var ruleText = regexp.MustCompile(`\((R\d+)\)`)

func found(stage string, err error) (fs []finding) {
	rule := ""
	if e := (*blobdir.Error)(nil); errors.As(err, &e) {
		rule = e.Rule
	}
	fs = append(fs, finding{stage, rule, err, err.Error()})
	for _, m := range ruleText.FindAllStringSubmatch(err.Error(), -1) {
		if m[1] != rule {
			fs = append(fs, finding{stage, m[1], err, err.Error()})
		}
	}
	return fs
}

// examine opens an image and reads all of it. Panics are the test's.
func examine(img []byte, o *blobdir.Options) (fs []finding) {
	d, err := blobdir.Open(&flat{img}, o)
	if err != nil {
		return found("open", err)
	}
	defer d.Close()
	names := []string{}
	err = d.View(func(tx *blobdir.Tx) error {
		for e, err := range tx.List("") {
			if err != nil {
				return err
			}
			names = append(names, e.Name)
		}
		return nil
	})
	if err != nil {
		fs = append(fs, found("list", err)...)
	}
	for _, name := range append(names, "empty", "net0/nvm", "uefi/vars", "tpm/permanent") {
		err := d.View(func(tx *blobdir.Tx) error {
			if _, err := tx.Get(name, 1<<20); !errors.Is(err, blobdir.ErrNotFound) && !errors.Is(err, blobdir.ErrAttached) {
				return err
			}
			return nil
		})
		if err != nil {
			fs = append(fs, found("get", err)...)
		}
	}
	rep, err := d.Check(context.Background(), nil)
	if err != nil {
		fs = append(fs, found("check", err)...)
	} else {
		for _, p := range rep.Errors {
			fs = append(fs, finding{"check", p.Code, nil, p.Where + ": " + p.Message})
		}
		for _, p := range rep.Leaks {
			fs = append(fs, finding{"leak", p.Code, nil, p.Where + ": " + p.Message})
		}
		for _, p := range rep.Warnings {
			fs = append(fs, finding{"warning", p.Code, nil, p.Where + ": " + p.Message})
			for _, m := range ruleText.FindAllStringSubmatch(p.Message, -1) {
				fs = append(fs, finding{"note", m[1], nil, p.Message})
			}
		}
	}
	if info, err := d.Info(); err != nil {
		fs = append(fs, found("info", err)...)
	} else if info.Status.Recovered != "" {
		fs = append(fs, finding{"recovered", "", nil, info.Status.Recovered})
	}
	return fs
}

func has(fs []finding, stage, rule string, kind error) bool {
	return slices.ContainsFunc(fs, func(f finding) bool {
		return slices.Contains(strings.Fields(stage), f.stage) && (rule == "" || f.rule == rule) && (kind == nil || errors.Is(f.kind, kind))
	})
}

func options(t testing.TB, kind string, readOnly bool) *blobdir.Options {
	o := openOptions(t, kind)
	o.ReadOnly = readOnly
	return o
}

// known tells whether every error is of one of the package's kinds.
func known(fs []finding) bool {
	return !slices.ContainsFunc(fs, func(f finding) bool {
		return f.kind != nil && !slices.ContainsFunc([]error{corrupt, tampered, unsupported, blobdir.ErrFormat, blobdir.ErrStraddled,
			blobdir.ErrKey, blobdir.ErrPlain}, func(kind error) bool { return errors.Is(f.kind, kind) })
	})
}

// judge returns what is wrong with the findings, or nothing.
func (v *vector) judge(ro, rw []finding) string {
	ok := true
	switch v.where {
	case atOpen:
		ok = has(ro, "open", v.rule, v.kind) && has(rw, "open", v.rule, v.kind)
	case atWrite:
		ok = !has(ro, "open", "", nil) && has(rw, "open", v.rule, v.kind)
	case atRead:
		ok = !has(ro, "open", "", nil) && has(ro, "list get", v.rule, v.kind) &&
			(has(ro, "check", v.rule, nil) || has(ro, "check", "R22", nil)) // check follows no extent twice
	case atCheck, atSlot:
		ok = !has(ro, "open list get", "", nil) && has(ro, "check", v.rule, nil)
	case "leak":
		ok = !has(ro, "open list get check", "", nil) && has(ro, "leak", v.rule, nil)
	case atNote:
		ok = !has(ro, "open list get check", "", nil) && has(ro, "note", v.rule, nil)
	case atAny:
		ok = len(ro) > 0 && (v.rule == "" || has(ro, "open note", v.rule, nil))
	case atNone:
		ok = !has(ro, "open list get check leak", "", nil) && !has(rw, "open list get check leak", "", nil)
	}
	if ok = ok && known(ro) && known(rw); ok {
		return ""
	}
	return fmt.Sprintf("want %s %v at %s; found\nread-only: %v\nwriting: %v", v.rule, v.kind, v.where, ro, rw)
}

func TestVectors(t *testing.T) {
	counts := map[string]int{}
	total := 0
	eachKind(t, func(t *testing.T, kind string) {
		good := grown(t, base(t, kind)).img
		require.Empty(t, examine(slices.Clone(good), options(t, kind, false)), "the good store")
		for _, v := range allVectors() {
			if v.only != "" && !strings.Contains(" "+v.only+" ", " "+kind+" ") {
				continue
			}
			t.Run(v.rule+"/"+v.name, func(t *testing.T) {
				v.run(t, good, kind)
				counts[v.rule]++
				total++
			})
		}
	})
	t.Logf("%d vectors of %d rules: %v", total, len(counts), counts)
	require.GreaterOrEqual(t, total, 150)
}

func (v *vector) run(t *testing.T, good []byte, kind string) {
	f := takeApart(t, good, rawKey)
	v.fault(f)
	if v.where == atSlot {
		f.settled = nil
	}
	img := f.reseal()
	ro := examine(slices.Clone(img), options(t, kind, true))
	rw := examine(slices.Clone(img), options(t, kind, false))
	require.Empty(t, v.judge(ro, rw))

	// Whatever the fault, these must not panic, nor say that all is well.
	if kind != "plain" {
		examine(slices.Clone(img), &blobdir.Options{Keyless: true})
	}
	examine(slices.Clone(img), &blobdir.Options{Key: openOptions(t, kind).Key, Previous: true})
	again := takeApart(t, good, rawKey)
	if v.where == atSlot {
		// The same fault in a root that was settled is damage.
		v.fault(again)
		img = again.reseal()
		if bytes.Equal(img[:4096], good[:4096]) {
			require.True(t, has(examine(img, options(t, kind, true)), "open", "R71", blobdir.ErrCorrupt))
		}
		return
	}
	v.fault(again)
	again.settled = nil
	found := examine(again.reseal(), options(t, kind, true))
	if v.where != atNone && v.where != atNote && v.where != atWrite && !strings.HasPrefix(v.name, "settled") {
		require.NotEmpty(t, found, "the same fault in a generation that isn't settled")
	}
}

// damagedFixtures are the vectors that are shipped as files.
var damagedFixtures = []struct{ file, kind, vector string }{
	{"root-version", "plain", "R3/root"},
	{"root-checksum", "plain", "R10/root"},
	{"root-straddled", "plain", "R14/parent"},
	{"root-critical-extension", "plain", "R8/root critical"},
	{"root-mac", "sealed", "R18/root"},
	{"settled-mac", "sealed", "R18/settled"},
	{"node-misaligned", "plain", "R20/directory misaligned"},
	{"node-beyond-end", "plain", "R21/directory"},
	{"block-two-users", "plain", "R22/two chunks"},
	{"chunk-checksum", "plain", "R23/chunk"},
	{"node-mac", "sealed", "R24/directory"},
	{"chunk-tag", "sealed", "R25/tag"},
	{"chunk-older", "sealed", "R25/chunk, older"},
	{"name-dotdot", "plain", "R40/a\\..\\b"},
	{"time-february-30", "plain", "R7/30 February"},
	{"keys-descending", "plain", "R32/directory"},
	{"free-in-use", "plain", "R53/in use"},
	{"key-slots-empty", "sealed", "R60/no slots"},
	{"root-lost", "plain", "R71/zeroed"},
	{"no-root", "plain", "R13/both zeroed"},
}

// smallBase is the store of the files. Its content is nearly all holes, so
// that each file has few KiB though ciphertext can't be compressed.
func smallBase(t testing.TB, kind string) []byte {
	dev := &flat{make([]byte, 256<<10)}
	d, err := blobdir.Create(dev, createOptions(t, kind))
	require.NoError(t, err)
	require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
		for name, chunks := range map[string]int64{"net0/nvm": 2, "tpm/permanent": 6} {
			if err := tx.Create(name, &blobdir.Meta{Type: "test", Writer: "vectors 1", ChunkSize: 4096}); err != nil {
				return err
			}
			for i := range chunks {
				if _, err := tx.WriteAt(name, []byte("nvstore"), i*4096); err != nil {
					return err
				}
			}
		}
		return errors.Join(tx.Put("empty", nil, nil), tx.Put("uefi/vars", []byte("vars"), nil))
	}, nil))
	for i := range 3 {
		require.NoError(t, put(d, "uefi/vars", []byte{byte(i)}))
	}
	require.NoError(t, d.Close())
	f := takeApart(t, dev.p, rawKey)
	for _, e := range f.free.el.at("extents").kids {
		if off := e.at("offset").int(); e.at("freed").int() < f.body().at("parentGeneration").int() {
			clear(dev.p[off : off+e.at("length").int()]) // neither root needs it
		}
	}
	if kind != "plain" {
		return dev.p
	}
	return grown(t, dev.p).img
}

func findVector(t testing.TB, name string) vector {
	for _, v := range allVectors() {
		if v.rule+"/"+v.name == name {
			return v
		}
	}
	require.Fail(t, "no vector "+name)
	return vector{}
}

const damagedDir = "../fixtures/damaged"

func TestDamagedFixtures(t *testing.T) {
	if *updateFixtures {
		writeDamaged(t)
	}
	readme, err := os.ReadFile(filepath.Join(damagedDir, "README.md"))
	require.NoError(t, err)
	for _, x := range damagedFixtures {
		t.Run(x.file, func(t *testing.T) {
			v := findVector(t, x.vector)
			path := filepath.Join(damagedDir, x.file+".raw.gz")
			st, err := os.Stat(path)
			require.NoError(t, err)
			require.LessOrEqual(t, st.Size(), int64(4096))
			require.Contains(t, string(readme), "`"+x.file+".raw.gz` | "+v.rule+" |")
			img := gunzip(t, path)
			ro := examine(slices.Clone(img), options(t, x.kind, true))
			rw := examine(slices.Clone(img), options(t, x.kind, false))
			require.Empty(t, v.judge(ro, rw))
		})
	}
	files, err := filepath.Glob(damagedDir + "/*.gz")
	require.NoError(t, err)
	require.Len(t, files, len(damagedFixtures))
}

func gunzip(t testing.TB, path string) []byte {
	p, err := os.ReadFile(path)
	require.NoError(t, err)
	z, err := gzip.NewReader(bytes.NewReader(p))
	require.NoError(t, err)
	img, err := io.ReadAll(z)
	require.NoError(t, err)
	return img
}

func gzipped(t testing.TB, p []byte) []byte {
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	require.NoError(t, err)
	_, err = z.Write(p)
	require.NoError(t, err)
	require.NoError(t, z.Close())
	return b.Bytes()
}

func writeDamaged(t *testing.T) {
	require.NoError(t, os.MkdirAll(damagedDir, 0o755))
	var b strings.Builder
	b.WriteString(damagedHead)
	for _, x := range damagedFixtures {
		v := findVector(t, x.vector)
		f := takeApart(t, smallBase(t, x.kind), rawKey)
		v.fault(f)
		if v.where == atSlot {
			f.settled = nil
		}
		require.NoError(t, os.WriteFile(filepath.Join(damagedDir, x.file+".raw.gz"), gzipped(t, f.reseal()), 0o644))
		fmt.Fprintf(&b, "| `%s.raw.gz` | %s | %s | %s | %s |\n", x.file, v.rule, x.kind, v.name, map[string]string{
			atOpen: "any command fails", atWrite: "commands that write fail", atRead: "`nvtool get`, `ls` or `check` fails",
			atCheck: "`nvtool check` reports it", atSlot: "`nvtool check` reports it; the other root counts"}[v.where])
	}
	require.NoError(t, os.WriteFile(filepath.Join(damagedDir, "README.md"), []byte(b.String()), 0o644))
}

const damagedHead = `# Damaged stores

Raw images of small stores with one fault each. Checksums, MACs and the settled
record are right unless they are the fault. The rules are those of FORMAT.md,
section 14; ` + "`TestVectors`" + ` in blobdir generates many more.

    gunzip -k root-version.raw.gz
    nvtool check root-version.raw

The sealed ones open with a key file of 32 bytes 0x5a:

    head -c 32 /dev/zero | tr '\0' 'Z' > key
    nvtool check --key-file key root-mac.raw

The files are made by ` + "`go test ./blobdir -run TestDamagedFixtures -update`" + `.

| File | Rule | Store | Fault | Shows |
|---|---|---|---|---|
`
