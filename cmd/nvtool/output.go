package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf8"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"
)

// isTerminal tells whether w is one.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// colours tells whether to write in colour.
func (a *app) colours() bool {
	return isTerminal(a.out) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// width is the terminal's, or 80.
func (a *app) width() int {
	if f, ok := a.out.(*os.File); ok {
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
			return w
		}
	}
	if w, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil && w > 0 {
		return w
	}
	return 80
}

// warnf says what the user should know, and is no error.
func (a *app) warnf(format string, args ...any) {
	if !a.quiet {
		fmt.Fprintf(a.err, "nvtool: warning: "+format+"\n", args...)
	}
}

// sayf confirms what was done. With --json the verb prints facts instead.
func (a *app) sayf(format string, args ...any) {
	if !a.quiet && !a.json {
		fmt.Fprintf(a.out, format+"\n", args...)
	}
}

// printJSON prints v, indented.
func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printTable prints a table on a terminal, and columns of words elsewhere.
func (a *app) printTable(header []string, rows [][]string) error {
	if !isTerminal(a.out) {
		w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
		for _, row := range append([][]string{header}, rows...) {
			for i, cell := range row {
				if cell == "" {
					row[i] = "-"
				}
			}
			fmt.Fprintln(w, strings.Join(row, "\t"))
		}
		return w.Flush()
	}
	t := table.NewWriter()
	t.SetOutputMirror(a.out)
	t.SetStyle(table.StyleLight)
	t.Style().Format.Header = text.FormatDefault
	if !a.colours() {
		text.DisableColors()
	} else {
		t.Style().Color.Header = text.Colors{text.Bold}
	}
	t.AppendHeader(tableRow(header))
	for _, row := range rows {
		t.AppendRow(tableRow(row))
	}
	t.Render()
	return nil
}

func tableRow(cells []string) table.Row {
	row := make(table.Row, len(cells))
	for i, c := range cells {
		row[i] = c
	}
	return row
}

// count writes a number of things.
func count(n int64, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// printable keeps what comes from an image from steering the terminal.
func printable(s string) string {
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return strconv.Quote(s)
		}
	}
	return s
}

// printableAll is printable for each of a list, separated by spaces.
func printableAll(list []string) string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = printable(s)
	}
	return strings.Join(out, " ")
}

// isText tells whether a terminal shows p as it is. p may end in the middle
// of a character.
func isText(p []byte) bool {
	for len(p) > 0 {
		r, n := utf8.DecodeRune(p)
		if r == utf8.RuneError && n <= 1 && utf8.FullRune(p) || unicode.IsControl(r) && !strings.ContainsRune("\n\r\t", r) {
			return false
		}
		p = p[max(n, 1):]
	}
	return true
}

// A bar shows progress on a terminal. Nil, it shows nothing.
type bar struct {
	all *mpb.Progress
	one *mpb.Bar
}

func (a *app) bar(label string, total int64) *bar {
	if a.quiet || !isTerminal(a.err) {
		return nil
	}
	p := mpb.New(mpb.WithOutput(a.err), mpb.WithWidth(min(a.width(), 60)))
	return &bar{p, p.AddBar(total, mpb.BarRemoveOnComplete(),
		mpb.PrependDecorators(decor.Name(label+" ")),
		mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f "), decor.Percentage()))}
}

func (b *bar) set(n, total int64) {
	if b != nil {
		b.one.SetTotal(total, false)
		b.one.SetCurrent(n)
	}
}

// end takes the bar away.
func (b *bar) end() {
	if b != nil {
		b.one.Abort(true)
		b.all.Wait()
	}
}

// writeOutput makes a file of what fn writes; path "" or "-" is standard
// output. A file appears, or replaces the one there was, only when it is
// whole and durable. Where something that isn't a regular file has that name,
// such as a pipe, it is written to directly.
func (a *app) writeOutput(path string, fn func(io.Writer) error) error {
	if path == "" || path == "-" {
		return fn(a.out)
	}
	mode := os.FileMode(0o600)
	if info, err := os.Stat(path); err == nil {
		if !info.Mode().IsRegular() {
			return writeThrough(path, fn)
		}
		mode = info.Mode().Perm()
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return err
		}
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.tmp")
	if err != nil {
		return err
	}
	err = fn(tmp)
	if err == nil {
		err = errors.Join(tmp.Chmod(mode), tmp.Sync())
	}
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		os.Remove(tmp.Name())
		return err
	}
	return syncDir(filepath.Dir(path))
}

func writeThrough(path string, fn func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(fn(f), f.Close())
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// writeBytes is writeOutput for bytes that are there already. Bytes that
// aren't text are kept off a terminal.
func (a *app) writeBytes(path string, p []byte) error {
	if (path == "" || path == "-") && isTerminal(a.out) && !isText(p) {
		return errBinary()
	}
	return a.writeOutput(path, func(w io.Writer) error {
		_, err := io.Copy(w, bytes.NewReader(p))
		return err
	})
}

func errBinary() error {
	return withHint(usage(errors.New("the content isn't text, and standard output is a terminal")), "write it to a file with -o FILE, or pipe it, as into xxd")
}

// A contextReader stops when the context does.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
