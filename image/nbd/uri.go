package nbd

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"nvstore.dev/image"
)

// DefaultPort is where a server listens that no port is said of.
const DefaultPort = "10809"

// A Target says where an export is.
type Target struct {
	Network string // "unix" or "tcp"
	Address string // a socket's path (@ or NUL first: in the abstract namespace), or HOST:PORT
	Export  string // at most 4096 bytes; empty is the server's default export

	TLS        bool   // insist on TLS
	Hostname   string // to verify the server's certificate by; empty is Address's host
	CertDir    string // folder with ca-cert.pem, client-cert.pem, client-key.pem; empty is the system's roots
	SkipVerify bool   // take any certificate

	PSKFile  string // TLS by a key from this file (see ReadPSKs), in place of certificates
	Username string // the key's identity; empty is the only key's
}

// ParseURI reads nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, and
// their TLS forms nbds:// and nbds+unix://, with libnbd's parameters
// tls-hostname, tls-verify-peer, tls-certificates, tls-psk-file and
// tls-type=x509 or psk; a user, as in nbds://USER@HOST or nbds+unix://USER@/,
// is the identity of a key. The format is NetworkBlockDevice's doc/uri.md.
// Errors are of kind ErrURI, or image.ErrUnsupported for a good URI that asks
// for what isn't here.
func ParseURI(s string) (*Target, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("%w: %q doesn't parse", ErrURI, s)
	}
	bad := func(field string, got any, want string) error {
		return &image.FormatError{Path: s, Off: -1, Struct: "nbd URI", Field: field, Got: got, Want: want, Kind: ErrURI}
	}
	t := &Target{Export: strings.TrimPrefix(u.Path, "/")}
	var unix bool
	switch u.Scheme {
	case "nbd", "nbd+tcp":
	case "nbds", "nbds+tcp":
		t.TLS = true
	case "nbd+unix":
		unix = true
	case "nbds+unix":
		unix, t.TLS = true, true
	default:
		return nil, bad("scheme", u.Scheme, "nbd, nbds, nbd+unix or nbds+unix")
	}
	if u.Opaque != "" || u.Fragment != "" {
		return nil, bad("path", nil, "scheme://, and no fragment")
	}
	if len(t.Export) > maxString || strings.ContainsRune(t.Export, 0) {
		return nil, bad("export", nil, "at most 4096 bytes, and no NUL")
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, bad("query", u.RawQuery, "name=value, separated by &")
	}
	if err := t.parameters(q, unix, bad); err != nil {
		return nil, err
	}
	if err := t.user(u.User, bad); err != nil {
		return nil, err
	}
	if unix {
		if u.Host != "" {
			return nil, bad("host", u.Host, "none: the socket is a parameter")
		}
		t.Network = "unix"
		if t.Address == "" {
			return nil, bad("socket", nil, "a path, as in nbd+unix:///EXPORT?socket=PATH")
		}
		return t, nil
	}
	t.Network = "tcp"
	host, port := u.Hostname(), u.Port()
	if port == "" {
		port = DefaultPort
	}
	if !validHost(host) {
		return nil, bad("host", host, "a name or an address")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return nil, bad("port", port, "1 to 65535")
	}
	t.Address = net.JoinHostPort(host, port)
	return t, nil
}

// user takes the user before the host, whom only TLS knows.
func (t *Target) user(u *url.Userinfo, bad func(string, any, string) error) error {
	if u == nil {
		return nil
	}
	t.Username = u.Username()
	_, password := u.Password()
	if password || !t.TLS || !validIdentity(t.Username) {
		return bad("user", nil, "the identity of a key, with nbds or nbds+unix, and no password")
	}
	return nil
}

// validHost tells whether a host can be a name or an address. Whether it is
// one shows when it is dialled.
func validHost(host string) bool {
	if strings.Contains(host, ":") {
		_, err := netip.ParseAddr(host)
		return err == nil
	}
	for _, c := range host {
		if c <= ' ' || c == 0x7f || strings.ContainsRune(`/\?#@[]<>"^`+"`{|}%", c) {
			return false
		}
	}
	return host != ""
}

func (t *Target) parameters(q url.Values, unix bool, bad func(string, any, string) error) error {
	for key, values := range q {
		if len(values) != 1 {
			return bad(key, nil, "each parameter once")
		}
		v := values[0]
		switch key {
		case "socket":
			if !unix {
				return bad(key, v, "only with nbd+unix or nbds+unix")
			}
			if t.Address = v; len(v) > 0 && v[0] == 0 {
				t.Address = "@" + v[1:] // as package net has it
			}
		case "tls-hostname":
			t.Hostname = v
		case "tls-certificates":
			t.CertDir = v
		case "tls-verify-peer":
			if v != "0" && v != "1" {
				return bad(key, v, "0 or 1")
			}
			t.SkipVerify = v == "0"
		case "tls-psk-file":
			t.PSKFile = v
		case "tls-type":
			if v != "x509" && v != "psk" {
				return fmt.Errorf("nbd URI: tls-type %q: %w: x509 and psk are", v, image.ErrUnsupported)
			}
		default:
			return bad(key, v, "a parameter of an NBD URI")
		}
	}
	switch kind := q.Get("tls-type"); {
	case !t.TLS && (t.Hostname != "" || t.CertDir != "" || t.SkipVerify || t.PSKFile != ""):
		return bad("scheme", nil, "nbds or nbds+unix where TLS is asked for")
	case t.PSKFile != "" && (t.CertDir != "" || kind == "x509"):
		return bad("tls-psk-file", nil, "either a key or certificates")
	case t.PSKFile == "" && kind == "psk":
		return bad("tls-psk-file", nil, "a file of keys, with tls-type=psk")
	}
	return nil
}

// String returns the target's URI.
func (t *Target) String() string {
	u := url.URL{Scheme: "nbd", Path: "/" + t.Export}
	if t.Username != "" {
		u.User = url.User(t.Username)
	}
	if t.TLS {
		u.Scheme = "nbds"
	}
	q := url.Values{}
	if t.Network == "unix" {
		u.Scheme += "+unix"
		path := t.Address
		if strings.HasPrefix(path, "@") {
			path = "\x00" + path[1:]
		}
		q.Set("socket", path)
	} else {
		u.Host = strings.TrimSuffix(t.Address, ":"+DefaultPort)
	}
	if t.Hostname != "" {
		q.Set("tls-hostname", t.Hostname)
	}
	if t.CertDir != "" {
		q.Set("tls-certificates", t.CertDir)
	}
	if t.SkipVerify {
		q.Set("tls-verify-peer", "0")
	}
	if t.PSKFile != "" {
		q.Set("tls-psk-file", t.PSKFile)
	}
	u.RawQuery = strings.ReplaceAll(q.Encode(), "%2F", "/")
	s := u.String()
	if t.Network == "unix" && u.User == nil {
		// net/url leaves the empty authority out.
		s = strings.Replace(s, ":/", ":///", 1)
		s = strings.Replace(s, "://///", ":///", 1)
	}
	return s
}
