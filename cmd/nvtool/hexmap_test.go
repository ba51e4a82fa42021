package main

import (
	"bytes"
	"fmt"
	"html"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/formats"
)

// samples are all images among the fixtures, and hostile ones.
func samples(t *testing.T) map[string]*hexMap {
	all := map[string]*hexMap{}
	add := func(name string, f vpd.Format, image []byte) {
		m, err := newHexMap(name, f, image)
		require.NoError(t, err, name)
		all[name] = m
	}
	for _, f := range formats.All() {
		paths, err := filepath.Glob("../../fixtures/vpd/" + f.Name() + "/*")
		require.NoError(t, err)
		for _, p := range paths {
			if strings.HasSuffix(p, ".md") || strings.HasSuffix(p, ".jsonc") {
				continue
			}
			image, err := os.ReadFile(p)
			require.NoError(t, err)
			if _, _, err := f.Parse(image); err == nil {
				add(filepath.Base(filepath.Dir(p))+"/"+filepath.Base(p), f, image)
			}
		}
	}
	raw := formats.ByName("raw")
	add("zeros", raw, make([]byte, 100))
	add("one", raw, []byte{1})
	add("large", raw, bytes.Repeat([]byte("0123456789abcdef\x00\xff"), 10000))
	gvpd := formats.ByName("gvpd")
	image, _, err := gvpd.Pack([]byte(`{"format": "gvpd", "values": {"a": "<script>alert(1)</script>\"'&"}}`))
	require.NoError(t, err)
	add(`<b>&"'</b>`, gvpd, image)
	require.Greater(t, len(all), 20)
	return all
}

var escape = regexp.MustCompile("\x1b\\[[0-9;]*m")

// The drawing has every byte that it doesn't say it leaves out, once and in
// order, whatever the colours.
func TestHexMapTerminal(t *testing.T) {
	for name, m := range samples(t) {
		var plain, coloured bytes.Buffer
		require.NoError(t, m.terminal(&plain, 120, false))
		require.NoError(t, m.terminal(&coloured, 120, true))
		require.Equal(t, plain.String(), escape.ReplaceAllString(coloured.String(), ""), name)
		require.NotContains(t, plain.String(), "\x1b")
		pos := 0
		digits := m.offsetDigits()
		for line := range strings.SplitSeq(strings.TrimSpace(plain.String()), "\n") {
			var n int
			var b byte
			if k, _ := fmt.Sscanf(strings.TrimSpace(line), "... %d bytes more of %x", &n, &b); k == 2 {
				require.Equal(t, bytes.Repeat([]byte{b}, n), m.image[pos:pos+n], name)
				pos += n
				continue
			}
			if k, _ := fmt.Sscanf(strings.TrimSpace(line), "... %d bytes more;", &n); k == 1 {
				pos += n
				continue
			}
			require.Equal(t, fmt.Sprintf("%0*x", digits, pos), line[:digits], name)
			for _, word := range strings.Fields(line[digits+2 : digits+2+3*hexWidth]) {
				require.Equal(t, fmt.Sprintf("%02x", m.image[pos]), word, name)
				pos++
			}
		}
		require.Equal(t, len(m.image), pos, name)
	}
}

// The page names every field, has what comes from images escaped, and fetches
// nothing.
func TestHexMapPage(t *testing.T) {
	for name, m := range samples(t) {
		var b bytes.Buffer
		require.NoError(t, writePage(&b, name, []*hexMap{m, m}))
		page := b.String()
		require.Equal(t, 1, strings.Count(page, "<script>"), name)
		require.NotRegexp(t, `(?i)(src|href)="?(https?:|//)|@import|url\(`, page)
		text := html.UnescapeString(page)
		for i := range m.parts {
			require.Contains(t, text, printable(m.parts[i].Name), name)
		}
		for _, q := range m.problems {
			require.Contains(t, text, printable(q.String()), name)
		}
		for _, tag := range []string{"div", "section", "span", "table", "tr", "td", "i", "u", "ul", "li"} {
			require.Equal(t, strings.Count(page, "<"+tag+" ")+strings.Count(page, "<"+tag+">"), strings.Count(page, "</"+tag+">"), "%s %s", name, tag)
		}
	}
}

// A checksum covers what its format says, and a problem is where it is.
func TestHexMapCover(t *testing.T) {
	m := samples(t)["fru/bad-product.bin"]
	find := func(name string) *hexPart {
		for i := range m.parts {
			if m.parts[i].Name == name {
				return &m.parts[i]
			}
		}
		t.Fatal(name)
		return nil
	}
	check := find("product.checksum")
	require.True(t, check.check)
	require.Len(t, check.bad, 1)
	require.Equal(t, "product.checksum", m.parts[find("product.manufacturer").cover].Name)
	require.Empty(t, find("board.checksum").bad)
	require.Equal(t, "1 problem", m.verdict())

	bytesOf := 0
	for i := range m.parts {
		require.Equal(t, int64(bytesOf), m.parts[i].Off)
		bytesOf += int(m.parts[i].Len)
	}
	require.Equal(t, len(m.image), bytesOf)
}
