package chain

import (
	"fmt"
	"strings"
)

var LinkOver = linkOver

// ReplaceSyncDir makes f run instead of syncDir, until it is undone.
func ReplaceSyncDir(f func(dir string) error) (undo func()) {
	old := syncDir
	syncDir = f
	return func() { syncDir = old }
}

// Render parses a location and writes it again, in one form: "" for what
// doesn't parse.
func Render(location string) (string, error) {
	n, err := parse(location)
	if err != nil {
		return "", err
	}
	if n.driver == "" {
		return n.path, nil
	}
	var b strings.Builder
	n.render(&b, "")
	return b.String(), nil
}

func (n *node) render(b *strings.Builder, prefix string) {
	put := func(key, value string) {
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(prefix + key + "=" + strings.ReplaceAll(value, ",", ",,"))
	}
	put("driver", n.driver)
	for _, f := range [][2]string{{"filename", n.path}, {"dir", n.dir}, {"machine", n.machine}} {
		if f[1] != "" {
			put(f[0], f[1])
		}
	}
	if n.window {
		put("offset", fmt.Sprint(n.offset))
		if n.size >= 0 {
			put("size", fmt.Sprint(n.size))
		}
	}
	if n.child != nil {
		n.child.render(b, prefix+"file.")
	}
}
