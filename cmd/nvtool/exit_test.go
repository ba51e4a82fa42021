package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/image/nbd"
	"nvstore.dev/vpd"
)

func TestExitCodes(t *testing.T) {
	codes, names := map[int]bool{}, map[string]bool{}
	for _, k := range kinds {
		require.False(t, codes[k.code], "code %d twice", k.code)
		require.False(t, names[k.name], "name %s twice", k.name)
		codes[k.code], names[k.name] = true, true
		require.True(t, k.code >= 0 && k.code <= 3 || k.code >= 10 && k.code < 126 || k.code == 130, "%d is the shell's", k.code)
		require.NotEmpty(t, k.text)
	}
	for _, c := range []struct {
		err  error
		want int
	}{
		{errors.New("x"), 1},
		{usagef("x"), 2},
		{invalidf("x"), 3},
		{fmt.Errorf("a: %w", blobdir.ErrInvalid), 3},
		{fmt.Errorf("%w: %w", blobdir.ErrInvalid, keyslot.ErrNotFound), 10},
		{image.ErrNotFound, 10},
		{blobdir.ErrKey, 11},
		{errNoKey, 21},
		{blobdir.ErrCorrupt, 12},
		{&image.FormatError{Want: "a cluster", Kind: image.ErrCorrupt}, 12},
		{&image.FormatError{Want: "a cluster inside the file", Kind: image.ErrCorrupt}, 24},
		{image.ErrLocked, 13},
		{&blobdir.SpaceError{Missing: 1}, 14},
		{fmt.Errorf("%w: %w", blobdir.ErrPoisoned, syscall.ENOSPC), 14},
		{blobdir.ErrPoisoned, 1},
		{blobdir.ErrReverted, 15},
		{&blobdir.Error{Kind: blobdir.ErrStraddled, Rule: "R14"}, 15},
		{&blobdir.Error{Kind: blobdir.ErrTampered, Rule: "R24"}, 16},
		{blobdir.ErrExist, 17},
		{image.ErrUnsupported, 18},
		{blobdir.ErrFormat, 19},
		{&blobdir.Error{Kind: blobdir.ErrCorrupt, Rule: "R71"}, 22},
		{&blobdir.Error{Kind: blobdir.ErrCorrupt, Rule: "R13", Want: "at least one readable root"}, 23},
		{io.ErrUnexpectedEOF, 24},
		{blobdir.ErrPlain, 25},
		{vpd.ErrSpec, 27},
		{fmt.Errorf("%w: %w", nbd.ErrDisconnected, io.EOF), 29},
		{nbd.ErrURI, 3},
		{errors.Join(blobdir.ErrNotFound, nil), 10},
	} {
		require.Equal(t, c.want, kindOf(c.err).code, "%v", c.err)
		require.Equal(t, c.want, kindOf(withHint(fmt.Errorf("around: %w", c.err), "x")).code, "%v", c.err)
	}
}

// Every verb has a script, help, and at most one line of what it does.
func TestVerbs(t *testing.T) {
	a := &app{out: io.Discard, err: io.Discard}
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		require.NotEmpty(t, c.Short, c.CommandPath())
		require.Less(t, len(c.Short), 90, c.CommandPath())
		require.False(t, strings.HasSuffix(c.Short, "."), c.CommandPath())
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	root := a.root()
	walk(root)
	for _, c := range root.Commands() {
		if c.Name() == "img" { // as many verbs as the rest
			for _, sub := range c.Commands() {
				require.FileExists(t, "testdata/script/img-"+sub.Name()+".txtar")
			}
		} else if c.Name() != "exit-codes" {
			found, err := filepath.Glob("testdata/script/" + c.Name() + "[._]*") // of a group, for some of its verbs
			require.NoError(t, err)
			require.NotEmpty(t, found, c.Name())
		}
		var out bytes.Buffer
		require.Zero(t, run([]string{"help", c.Name()}, &out, &out), c.Name())
		require.NotEmpty(t, out.String())
	}
}
