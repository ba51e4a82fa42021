package chain

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"

	"nvstore.dev/image"
	"nvstore.dev/image/nbd"
)

// nbdSchemes are those that nbd.ParseURI knows.
var nbdSchemes = []string{"nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix"}

func isNBD(scheme string) bool { return slices.Contains(nbdSchemes, strings.ToLower(scheme)) }

func parseNBD(location string) (*node, error) {
	t, err := nbd.ParseURI(location)
	if err != nil {
		var f *image.FormatError
		if errors.As(err, &f) {
			return nil, badLocation(location, f.Field, f.Got, f.Want)
		}
		return nil, err
	}
	return &node{driver: "nbd", target: t, size: -1}, nil
}

// takeNBD reads what QEMU's driver nbd takes, apart from its tls-creds, which
// name an object in QEMU.
func (n *node) takeNBD(location, prefix string, own map[string]string) error {
	n.target = &nbd.Target{}
	var kind, host, port, tls string
	for _, f := range []struct {
		key string
		dst *string
	}{
		{"server.type", &kind}, {"server.path", &n.target.Address}, {"server.host", &host}, {"server.port", &port},
		{"export", &n.target.Export}, {"tls-hostname", &n.target.Hostname}, {"tls-certificates", &n.target.CertDir},
		{"tls-psk-file", &n.target.PSKFile}, {"tls-username", &n.target.Username}, {"tls", &tls},
	} {
		var err error
		if *f.dst, err = take(location, prefix, own, f.key, false); err != nil {
			return err
		}
	}
	n.target.TLS = tls == "on"
	bad := func(key string, got any, want string) error { return badLocation(location, prefix+key, got, want) }
	switch {
	case tls != "" && tls != "on" && tls != "off":
		return bad("tls", tls, "on or off")
	case !n.target.TLS && n.target.CertDir+n.target.Hostname+n.target.PSKFile+n.target.Username != "":
		return bad("tls", nil, "on, where certificates, a hostname or a key are given")
	case n.target.CertDir != "" && n.target.PSKFile != "":
		return bad("tls-psk-file", nil, "either a key or certificates")
	case len(n.target.Export) > 4096 || strings.ContainsRune(n.target.Export, 0):
		return bad("export", nil, "at most 4096 bytes, and no NUL")
	case kind == "unix" && host+port != "":
		return bad("server.host", host, "none: the server is a unix socket")
	case kind == "unix" && n.target.Address == "":
		return bad("server.path", nil, "a socket's path")
	case kind == "unix":
		n.target.Network = "unix"
	case kind != "inet":
		return bad("server.type", kind, "unix or inet")
	case n.target.Address != "":
		return bad("server.path", n.target.Address, "none: the server is at server.host")
	case host == "":
		return bad("server.host", nil, "a name or an address")
	default:
		if port == "" {
			port = nbd.DefaultPort
		}
		n.target.Network, n.target.Address = "tcp", net.JoinHostPort(host, port)
	}
	return nil
}

// KeyFiles returns the files with pre-shared keys (tls-psk-file) that a
// location names; none if it makes no sense.
func KeyFiles(location string) []string {
	n, err := parse(location)
	if err != nil {
		return nil
	}
	return n.keyFiles()
}

func (n *node) keyFiles() (list []string) {
	if n.target != nil && n.target.PSKFile != "" {
		list = append(list, n.target.PSKFile)
	}
	for _, below := range []*node{n.child, n.header, n.backing, n.data} {
		if below != nil {
			list = append(list, below.keyFiles()...)
		}
	}
	return list
}

func (n *node) openNBD(readOnly bool) (image.Device, error) {
	d, err := nbd.OpenTarget(context.Background(), n.target, &nbd.Options{ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	return d, nil
}
