package blobdir_test

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
)

// FORMAT.md is compared with the code and with the golden stores.

const (
	formatFile = "../FORMAT.md"
	goldenDir  = "../fixtures/golden"
	oidDir     = "../fixtures/oid"
)

func readFile(t testing.TB, path string) string {
	p, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(p)
}

func goldenStore(t testing.TB, kind string) []byte {
	dev := &flat{make([]byte, 256<<10)}
	o := createOptions(t, kind)
	o.UUID = [16]byte{0x6e, 0x76, 0x73, 0x74, 0x6f, 0x72, 0x45, 0x20, 0x80, 0x67, 0x6f, 0x6c, 0x64, 0x65, 0x6e, 0x31}
	o.Label = "golden"
	d, err := blobdir.Create(dev, o)
	require.NoError(t, err)
	for _, e := range goldenBlobs() {
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
			if err := tx.Create(e.name, e.meta); err != nil {
				return err
			}
			if e.name != "tpm/permanent" {
				return tx.Put(e.name, e.data, nil)
			}
			for i := range 6 { // holes, so that ciphertext is short
				if _, err := tx.WriteAt(e.name, e.data[i*4096:i*4096+1], int64(i)*4096); err != nil {
					return err
				}
			}
			return nil
		}, nil))
	}
	require.NoError(t, d.Close())
	return dev.p
}

type goldenBlob struct {
	name string
	data []byte
	meta *blobdir.Meta
}

func goldenBlobs() []goldenBlob {
	state := make([]byte, 5*4096+1)
	for i := range 6 {
		state[i*4096] = '0' + byte(i)
	}
	return []goldenBlob{
		{"tpm/permanent", state, &blobdir.Meta{Type: "tpm2", ChunkSize: 4096}},
		{"empty", []byte{}, nil},
		{"net0/nvm", []byte("Intel NVM image v1"), &blobdir.Meta{Type: "nic-nvm", Writer: "nvtool 1", ChunkSize: 4096,
			Attributes: []blobdir.Attribute{{Key: "model", Value: "82574L"}}}},
	}
}

func golden(t testing.TB, kind string) []byte {
	return gunzip(t, filepath.Join(goldenDir, kind+".raw.gz"))
}

// The golden stores open, hold their blobs, and can be written.
func TestGolden(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		path := filepath.Join(goldenDir, kind+".raw.gz")
		if _, err := os.Stat(path); *updateFixtures && err != nil {
			require.NoError(t, os.WriteFile(path, gzipped(t, goldenStore(t, kind)), 0o644))
		}
		dev := &flat{golden(t, kind)}
		for range 2 {
			d, err := blobdir.Open(dev, openOptions(t, kind))
			require.NoError(t, err)
			rep := requireClean(t, d)
			require.Empty(t, rep.Warnings)
			require.NoError(t, d.View(func(tx *blobdir.Tx) error {
				for _, g := range goldenBlobs() {
					e, err := tx.Stat(g.name)
					require.NoError(t, err)
					if g.meta != nil {
						require.Equal(t, *g.meta, e.Meta)
					}
				}
				return nil
			}))
			for _, g := range goldenBlobs() {
				require.Equal(t, g.data, get(t, d, g.name))
			}
			require.NoError(t, put(d, "new", []byte("later")))
			require.NoError(t, d.Close())
		}
	})
}

// dump prints an element byte by byte, with the names of FORMAT.md.
func dump(b *strings.Builder, img []byte, e *el, name string, depth int, oids map[string]string) {
	end := e.off + e.head
	if e.tag&0x20 == 0 {
		end += len(e.val)
	}
	what := strings.Repeat("  ", depth) + name
	switch {
	case e.tag&0x20 != 0:
	case e.tag == 2:
		what += " = " + fmt.Sprint(e.int())
	case e.tag == 6:
		what += " = " + oids[string(e.val)]
	case e.tag == 0x0c || e.tag == 0x18:
		what += " = " + strconv.Quote(string(e.val))
	case e.tag == 1:
		what += " = " + map[byte]string{0: "FALSE", 0xff: "TRUE"}[e.val[0]]
	}
	for at := e.off; at < end; at += 16 {
		b.WriteString(strings.TrimRight(fmt.Sprintf("%06x  %-48s %s", at, fmt.Sprintf("% x", img[at:min(at+16, end)]), what), " ") + "\n")
		what = ""
	}
	for i, k := range e.kids {
		kid := fmt.Sprint(i)
		for _, f := range e.fields {
			if n, _, _ := strings.Cut(f, "="); e.has(n) && e.at(n) == k {
				kid = n
			}
		}
		dump(b, img, k, kid, depth+1, oids)
	}
}

// oidTable reads nvstore.oid: names by the identifiers' DER content.
func oidTable(t testing.TB) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(readFile(t, oidDir+"/nvstore.oid")) {
		f := strings.Split(line, "\t")
		m[string(derOID(t, f[0]))] = f[1]
	}
	return m
}

func derOID(t testing.TB, dotted string) []byte {
	var out []byte
	parts := strings.Split(dotted, ".")
	for i, p := range parts[1:] {
		n, err := strconv.ParseUint(p, 10, 31)
		require.NoError(t, err)
		if i == 0 {
			n += 40
		}
		var b []byte
		for first := true; first || n > 0; first = false {
			c := byte(n & 0x7f)
			if !first {
				c |= 0x80
			}
			b = append([]byte{c}, b...)
			n >>= 7
		}
		out = append(out, b...)
	}
	return out
}

// The hex in section 17 is that of the golden store.
func TestFormatDumps(t *testing.T) {
	img := golden(t, "plain")
	f := takeApart(t, img, nil)
	oids := oidTable(t)
	text := readFile(t, formatFile)
	var m *el
	for _, e := range f.entries() {
		if e.has("chunkMap") {
			m = e.at("chunkMap").to.el
		}
	}
	for _, x := range []struct {
		name string
		el   *el
	}{{"header", f.header}, {"root", f.root()}, {"settled record", f.settled}, {"directory node", f.dir.el}, {"chunk map node", m}, {"free node", f.free.el}} {
		var b strings.Builder
		dump(&b, img, x.el, x.name, 0, oids)
		block := regexp.MustCompile("(?s)(<!-- dump: " + x.name + " -->\n```\n)(.*?)(```\n)")
		got := block.FindStringSubmatch(text)
		require.NotNil(t, got, "no dump of the "+x.name)
		if *updateFixtures {
			text = block.ReplaceAllLiteralString(text, got[1]+b.String()+got[3])
			continue
		}
		require.Equal(t, b.String(), got[2], x.name)
	}
	if *updateFixtures {
		require.NoError(t, os.WriteFile(formatFile, []byte(text), 0o644))
	}
}

// Every rule that the code can report is in section 14, every rule there has
// a vector or a test, and the tests that the table names exist.
func TestFormatRules(t *testing.T) {
	text := readFile(t, formatFile)
	rows := map[string][]string{}
	for _, m := range regexp.MustCompile(`(?m)^\| (R\d+) \| (.*) \|$`).FindAllStringSubmatch(text, -1) {
		require.NotContains(t, rows, m[1], "two rows")
		rows[m[1]] = strings.Split(m[2], " | ")
		require.Len(t, rows[m[1]], 4, m[1])
	}
	tests := ""
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	for _, path := range files {
		src := readFile(t, path)
		if strings.HasSuffix(path, "_test.go") {
			tests += src
			continue
		}
		for _, m := range regexp.MustCompile(`"(R\d+)"`).FindAllStringSubmatch(src, -1) {
			require.Contains(t, rows, m[1], path)
		}
	}
	vectors := map[string]bool{}
	for _, v := range allVectors() {
		vectors[v.rule] = true
	}
	for rule, cells := range rows {
		shown := cells[3]
		if shown == "TestVectors" {
			require.True(t, vectors[rule], "no vector for "+rule)
			continue
		}
		for _, name := range strings.Split(shown, ", ") {
			require.Contains(t, tests, "func "+name+"(", rule)
		}
	}
	for rule := range vectors {
		if strings.HasPrefix(rule, "R") {
			require.Contains(t, rows, rule)
		}
	}
}

// The limits and the numbers of section 1 to 4 are those of the code.
func TestFormatNumbers(t *testing.T) {
	text := readFile(t, formatFile)
	require.Contains(t, text, fmt.Sprintf("0x%X", crc32.Checksum([]byte("123456789"), crcTable)))
	require.Contains(t, strings.Join(strings.Fields(text), " "), fmt.Sprintf("% x", blobdir.Magic))
	require.Contains(t, text, fmt.Sprintf("% x", arcDER))
	h := golden(t, "plain")
	require.True(t, bytes.HasPrefix(h, blobdir.Magic))
	src := readFile(t, "limits.go")
	compared := 0
	for _, m := range regexp.MustCompile(`(?m)^\| ([^|]+) \| ([0-9 ]+)(?: [a-z]+)? \| `+"`(max|min)(\\w+)` \\|$").FindAllStringSubmatch(text, -1) {
		n, err := strconv.ParseInt(strings.ReplaceAll(m[2], " ", ""), 10, 64)
		require.NoError(t, err)
		got := constant(t, src, m[3]+m[4])
		require.Equal(t, got, n, m[1])
		compared++
	}
	require.Equal(t, 20, compared)
	// Every limit of the code is in the table.
	for _, m := range regexp.MustCompile(`(?m)^\t((?:max|min)\w+) +=`).FindAllStringSubmatch(src, -1) {
		if m[1] != "maxCheckItems" {
			require.Contains(t, text, "| `"+m[1]+"` |")
		}
	}
}

// constant evaluates the few forms that limits.go uses.
func constant(t testing.TB, src, name string) int64 {
	m := regexp.MustCompile(`(?m)^\t` + name + ` += (\w+)(?: << (\d+))?`).FindStringSubmatch(src)
	require.NotNil(t, m, name)
	if m[1] == "MaxBlobSize" {
		return blobdir.MaxBlobSize
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	require.NoError(t, err)
	if m[2] != "" {
		s, err := strconv.Atoi(m[2])
		require.NoError(t, err)
		n <<= s
	}
	return n
}

// Both OID files have the identifiers of section 3, and no others.
func TestObjectIdentifiers(t *testing.T) {
	text := readFile(t, formatFile)
	var want []string
	for _, m := range regexp.MustCompile("(?m)^\\| arc\\.(\\d\\.\\d+) \\| `(\\w+)` \\|").FindAllStringSubmatch(text, -1) {
		want = append(want, arcString+m[1]+" "+m[2])
	}
	require.GreaterOrEqual(t, len(want), 11)
	want = append(want, strings.TrimSuffix(arcString, ".")+" nvstore")
	slices.Sort(want)

	var got []string
	for line := range strings.Lines(readFile(t, oidDir+"/nvstore.oid")) {
		f := strings.Split(line, "\t")
		got = append(got, f[0]+" "+f[1])
	}
	slices.Sort(got)
	require.Equal(t, want, got)

	got = nil
	for _, m := range regexp.MustCompile(`OID = ([\d ]+)\nComment = .*\nDescription = (\w+)\n`).FindAllStringSubmatch(readFile(t, oidDir+"/nvstore.cfg"), -1) {
		got = append(got, strings.ReplaceAll(m[1], " ", ".")+" "+m[2])
	}
	slices.Sort(got)
	require.Equal(t, want, got)
}

func tool(t testing.TB, name string, arg ...string) string {
	out, err := exec.Command(name, arg...).CombinedOutput()
	require.NoError(t, err, "%s %q: %s", name, arg, out)
	return string(out)
}

// The usual tools read what dd cuts out, of a raw image and of a qcow2.
func TestASN1Tools(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dir := t.TempDir()
		raw, qcow, back := filepath.Join(dir, "a.raw"), filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "b.raw")
		dev := &flat{make([]byte, 256<<10)}
		d, err := blobdir.Create(dev, createOptions(t, kind))
		require.NoError(t, err)
		manyBlobs(t, d, 1000)
		var regions []blobdir.Region
		require.NoError(t, d.Regions(func(r blobdir.Region) error { regions = append(regions, r); return nil }))
		require.NoError(t, d.Close())
		img := dev.p
		require.NoError(t, os.WriteFile(raw, img, 0o644))
		tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow)
		tool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", qcow, back)

		names := map[blobdir.RegionKind]string{blobdir.RegionHeader: "Header", blobdir.RegionRoot: "Root", blobdir.RegionSettled: "Settled",
			blobdir.RegionDirectory: "Directory", blobdir.RegionChunkMap: "ChunkMap", blobdir.RegionFreeNode: "FreeSpace",
			blobdir.RegionFreeTree: "FreeTree", blobdir.RegionKeySlots: "KeySlots"}
		seen := map[blobdir.RegionKind]int{}
		for _, r := range regions {
			if names[r.Kind] == "" || seen[r.Kind] == 2 {
				continue
			}
			seen[r.Kind]++
			args := []string{"asn1parse", "-inform", "DER", "-in", raw, "-length", fmt.Sprint(derSize(img[r.Offset:])), "-oid", oidDir + "/nvstore.oid", "-i"}
			if r.Offset > 0 { // OpenSSL 3 refuses an offset of 0
				args = append(args, "-offset", fmt.Sprint(r.Offset))
			}
			out := tool(t, "openssl", args...)
			require.Contains(t, out, longName(t, "nvstore"+names[r.Kind]))
			require.NotContains(t, strings.ToLower(out), "error")
			for _, file := range []string{raw, back} {
				out = tool(t, "sh", "-c", fmt.Sprintf("dd if=%s bs=4096 skip=%d count=2 status=none | dumpasn1 -z -c%s/nvstore.cfg -", file, r.Offset/4096, oidDir))
				require.Contains(t, out, "nvstore"+names[r.Kind]+" (")
				require.Contains(t, out, "0 warnings, 0 errors.")
				require.NotContains(t, out, "Error")
			}
			// And at the guest's offset in the qcow2 itself.
			out = tool(t, "qemu-io", "-r", "-f", "qcow2", "-c", fmt.Sprintf("read -v %d 64", r.Offset), qcow)
			require.Contains(t, out, fmt.Sprintf("%08x:  % x", r.Offset, img[r.Offset:r.Offset+16]))
		}
		want := 8
		if kind == "plain" {
			want = 7
		}
		require.Len(t, seen, want)
	})
}

func derSize(p []byte) int {
	e, _ := parseDER(p, 0)
	n := len(e.val)
	for _, k := range e.kids {
		n = k.off + derSize(p[k.off:]) - e.head
	}
	return e.head + n
}

func longName(t testing.TB, short string) string {
	for line := range strings.Lines(readFile(t, oidDir+"/nvstore.oid")) {
		if f := strings.Split(strings.TrimSpace(line), "\t"); f[1] == short {
			return f[2]
		}
	}
	require.Fail(t, short)
	return ""
}
