package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/nvstore"
)

func (a *app) lsCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	var long bool
	c := a.verb("ls IMAGE [PREFIX] [-l]", "List blobs", func(ctx context.Context, args []string) error {
		return a.ls(ctx, &ref, &key, args, long)
	})
	c.Long = `List the blobs whose names begin with PREFIX. A sealed store is listed
without its key too, unless its names are sealed; attributes need the key.`
	ref.flags(c)
	ref.previousFlag(c)
	key.flags(c, "the ")
	c.Flags().BoolVarP(&long, "long", "l", false, "size, type, time, generation and writer too, and whether live extents are attached")
	return c
}

func (a *app) ls(ctx context.Context, ref *imageRef, key *keyFlags, args []string, long bool) (err error) {
	args, err = ref.take(args, 0, 1, "at most a PREFIX")
	if err != nil {
		return err
	}
	prefix := ""
	if len(args) == 1 {
		prefix = nvstore.Canonical(args[0])
	}
	s, err := a.open(ctx, ref, key, browsing)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	info, err := s.Info()
	if err != nil {
		return err
	}
	list, err := s.List(prefix)
	if err != nil {
		return a.explain(ref, err)
	}
	hidden := len(list) > 0 && list[0].Name == ""
	if hidden || info.SealNames && len(list) == 0 && prefix != "" {
		a.warnf("the names in this store are sealed: give the key to see them")
	}
	if a.json {
		facts := make([]*blobFacts, len(list))
		for i := range list {
			facts[i] = entryFacts(&list[i])
		}
		return a.printJSON(facts)
	}
	if !long {
		for i := range list {
			fmt.Fprintln(a.out, shownName(&list[i]))
		}
		return nil
	}
	return a.listLong(list)
}

func (a *app) listLong(list []nvstore.Entry) error {
	rows := make([][]string, len(list))
	for i := range list {
		e := &list[i]
		rows[i] = []string{shownName(e), fmt.Sprint(e.Size), printable(e.Type), e.Modified.UTC().Format(time.RFC3339),
			fmt.Sprint(e.Generation), printable(e.Writer)}
	}
	header := []string{"name", "size", "type", "modified", "generation", "writer"}
	if slices.ContainsFunc(list, func(e nvstore.Entry) bool { return e.Live }) {
		header = append(header, "live")
		for i := range list {
			rows[i] = append(rows[i], liveState(&list[i]))
		}
	}
	return a.printTable(header, rows)
}

// liveState is whose turn a live extent is.
func liveState(e *nvstore.Entry) string {
	switch {
	case e.Attached:
		return "attached"
	case e.Live:
		return "detached"
	}
	return ""
}

func shownName(e *nvstore.Entry) string {
	if e.Name == "" {
		return "(sealed name, id " + hex.EncodeToString(e.ID[:]) + ")"
	}
	return printable(e.Name)
}

// blobFacts is a blob as --json shows it.
type blobFacts struct {
	Name       string            `json:"name"` // empty if it is sealed, and there is no key
	Size       int64             `json:"size"`
	Type       string            `json:"type"`
	Generation int64             `json:"generation"`
	Writer     string            `json:"writer"`
	Created    time.Time         `json:"created"`
	Modified   time.Time         `json:"modified"`
	Attributes map[string]string `json:"attributes"`
	ID         string            `json:"id"`
	ChunkSize  int               `json:"chunk_size"`
	Live       bool              `json:"live"`
	Attached   bool              `json:"attached"`
	Offset     int64             `json:"offset,omitempty"` // of a live extent
}

func entryFacts(e *nvstore.Entry) *blobFacts {
	f := &blobFacts{Name: e.Name, Size: e.Size, Type: e.Type, Generation: e.Generation, Writer: e.Writer,
		Created: e.Created.UTC(), Modified: e.Modified.UTC(), Attributes: make(map[string]string, len(e.Attributes)),
		ID: uuidText(e.ID), ChunkSize: e.ChunkSize, Live: e.Live, Attached: e.Attached, Offset: e.Offset}
	for _, at := range e.Attributes {
		f.Attributes[at.Key] = at.Value
	}
	return f
}
