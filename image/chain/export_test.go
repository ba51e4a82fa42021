package chain

import (
	"fmt"
	"net"
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
	if t := n.target; t != nil {
		put("server.type", map[string]string{"unix": "unix", "tcp": "inet"}[t.Network])
		if t.Network == "unix" {
			put("server.path", t.Address)
		} else {
			host, port, _ := net.SplitHostPort(t.Address)
			put("server.host", host)
			put("server.port", port)
		}
		if t.TLS {
			put("tls", "on")
		}
		for _, f := range [][2]string{{"export", t.Export}, {"tls-hostname", t.Hostname}, {"tls-certificates", t.CertDir},
			{"tls-psk-file", t.PSKFile}, {"tls-username", t.Username}} {
			if f[1] != "" {
				put(f[0], f[1])
			}
		}
	}
	if n.encrypt != "" {
		put("encrypt.format", n.encrypt)
	}
	if n.secret != "" {
		put(map[string]string{QCOW2: "encrypt.key-secret", LUKS: "key-secret"}[n.driver], n.secret)
	}
	for _, c := range []struct {
		name string
		node *node
	}{{"file.", n.child}, {"header.", n.header}, {"backing.", n.backing}, {"data-file.", n.data}} {
		if c.node != nil {
			c.node.render(b, prefix+c.name)
		}
	}
}
