package main

import (
	"errors"
	"slices"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
)

// A cacheMode is what QEMU calls the cache mode of an image: when it is durable,
// and whether its pages stay in the system's cache.
type cacheMode string

var cacheModes = []string{"writeback", "none", "writethrough", "directsync", "unsafe"}

func (m *cacheMode) flag(c *cobra.Command, name, short, what string) {
	*m = "writeback"
	c.Flags().VarP(m, name, short, what)
	c.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(cacheModes, cobra.ShellCompDirectiveNoFileComp))
}

func (m *cacheMode) Set(s string) error {
	if !slices.Contains(cacheModes, s) {
		return usagef("cache mode %q: writeback, none, writethrough, directsync or unsafe", s)
	}
	*m = cacheMode(s)
	return nil
}

func (m *cacheMode) String() string { return string(*m) }
func (*cacheMode) Type() string     { return "MODE" }

// unsafe: nothing is made durable.
func (m cacheMode) unsafe() bool { return m == "unsafe" }

// through: each write is durable before the next.
func (m cacheMode) through() bool { return m == "writethrough" || m == "directsync" }

// drop lets go of what the system keeps of d's clean pages, if the mode is one
// that goes past its cache.
func (m cacheMode) drop(d image.Device) error {
	if m != "none" && m != "directsync" {
		return nil
	}
	x, ok := image.As[image.CacheDropper](d)
	if !ok {
		return nil
	}
	if err := x.DropCache(); err != nil && !errors.Is(err, image.ErrUnsupported) {
		return err
	}
	return nil
}
