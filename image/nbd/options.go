package nbd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"nvstore.dev/image/nbd/internal/tlspsk"
)

// Options for Open. Nil is the zero value: for reading and writing, with the
// timeouts below.
type Options struct {
	// ReadOnly opens for reading. Without it, an export that is read-only
	// is refused with image.ErrReadOnly.
	ReadOnly bool

	// TLS, if not nil, is used where the target asks for TLS or not. Nil
	// makes one from the target's CertDir, if the target asks for TLS.
	TLS *tls.Config

	// PSK, if not nil, is what TLS is by, where the target asks for it or
	// not, in place of certificates. Nil takes the key from the target's
	// PSKFile, if it has one. Only TLS 1.3 has keys here.
	PSK *PSK

	// HandshakeTimeout bounds dialling and the handshake; 0 is 10 s.
	HandshakeTimeout time.Duration

	// RequestTimeout bounds one request, from when it is sent; the
	// connection is closed if the server hasn't answered. 0 is 60 s: while
	// QEMU saves a snapshot, it answers nobody. Less than 0 is for ever.
	RequestTimeout time.Duration

	// Reconnect is how long a request that finds no connection tries to
	// make one; 0 is 10 s, less than 0 is not at all.
	Reconnect time.Duration

	// InFlight is how many requests may be under way at once, 1 to 1024;
	// 0 is 64.
	InFlight int

	// Ordered says that the server begins requests in the order in which
	// they arrive, and that whatever changes the export's content underneath
	// waits for those that have begun, and has those that haven't wait, as
	// QEMU does for a snapshot that is loaded. A WriteBatch then has all its
	// writes under way at once.
	Ordered bool

	// Dial replaces how the connection is made, and made again.
	Dial func(ctx context.Context) (net.Conn, error)
}

// filled returns a copy with the defaults in place of zeros.
func (o *Options) filled() *Options {
	var c Options
	if o != nil {
		c = *o
	}
	if c.HandshakeTimeout <= 0 {
		c.HandshakeTimeout = 10 * time.Second
	}
	if c.RequestTimeout == 0 {
		c.RequestTimeout = 60 * time.Second
	}
	if c.Reconnect == 0 {
		c.Reconnect = 10 * time.Second
	}
	if c.InFlight <= 0 {
		c.InFlight = 64
	}
	c.InFlight = min(c.InFlight, 1024)
	return &c
}

func (o *Options) dial(ctx context.Context, t *Target) (net.Conn, error) {
	if o.Dial != nil {
		return o.Dial(ctx)
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, t.Network, t.Address)
	if err == nil {
		return nc, nil
	}
	if ctx.Err() == context.DeadlineExceeded {
		return nil, fmt.Errorf("%w: no connection to %s", ErrTimeout, t.Address)
	}
	return nil, err
}

// secure returns what puts TLS over a connection, or nil if it isn't wanted.
func (o *Options) secure(t *Target) (func(net.Conn) tlsConn, error) {
	if o.PSK != nil || o.TLS == nil && t.PSKFile != "" {
		k := o.PSK
		if k == nil {
			var err error
			if k, err = t.findPSK(); err != nil {
				return nil, err
			}
		}
		return func(nc net.Conn) tlsConn { return tlspsk.Client(nc, k.identity, k.key) }, nil
	}
	if o.TLS == nil && !t.TLS {
		return nil, nil
	}
	conf, err := o.clientTLS(t)
	if err != nil {
		return nil, err
	}
	return func(nc net.Conn) tlsConn { return tls.Client(nc, conf) }, nil
}

func (o *Options) clientTLS(t *Target) (*tls.Config, error) {
	conf := o.TLS.Clone()
	if conf == nil {
		var err error
		if conf, err = ClientTLS(t.CertDir); err != nil {
			return nil, err
		}
		conf.InsecureSkipVerify = t.SkipVerify
	}
	if conf.ServerName == "" {
		if conf.ServerName = t.Hostname; conf.ServerName == "" && t.Network != "unix" {
			conf.ServerName, _, _ = net.SplitHostPort(t.Address)
		}
	}
	if conf.ServerName == "" && !conf.InsecureSkipVerify {
		conf.ServerName = "localhost" // a unix socket's server is
	}
	return conf, nil
}

// The names of files in a folder of certificates are those of QEMU, libnbd and
// nbdkit.
const (
	caFile         = "ca-cert.pem"
	clientCertFile = "client-cert.pem"
	clientKeyFile  = "client-key.pem"
	serverCertFile = "server-cert.pem"
	serverKeyFile  = "server-key.pem"
)

// ClientTLS makes a client's configuration from a folder: ca-cert.pem, which
// the server's certificate is verified by (without it the system's roots), and
// client-cert.pem with client-key.pem, which may be absent together. An empty
// dir is no folder.
func ClientTLS(dir string) (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if dir == "" {
		return conf, nil
	}
	pool, err := readCA(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	conf.RootCAs = pool
	cert, err := readPair(dir, clientCertFile, clientKeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		if pool == nil {
			return nil, fmt.Errorf("nbd: neither %s nor %s in %s: %w", caFile, clientCertFile, dir, fs.ErrNotExist)
		}
		return conf, nil
	}
	if err != nil {
		return nil, err
	}
	conf.Certificates = []tls.Certificate{cert}
	return conf, nil
}

// ServerTLS makes a server's configuration from a folder: server-cert.pem with
// server-key.pem, and if verify is set, ca-cert.pem, which each client's
// certificate is verified by; clients without one are then turned away.
func ServerTLS(dir string, verify bool) (*tls.Config, error) {
	cert, err := readPair(dir, serverCertFile, serverKeyFile)
	if err != nil {
		return nil, err
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}}
	if !verify {
		return conf, nil
	}
	if conf.ClientCAs, err = readCA(dir); err != nil {
		return nil, err
	}
	conf.ClientAuth = tls.RequireAndVerifyClientCert
	return conf, nil
}

func readCA(dir string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(filepath.Join(dir, caFile))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("nbd: no certificate in %s", filepath.Join(dir, caFile))
	}
	return pool, nil
}

func readPair(dir, cert, key string) (tls.Certificate, error) {
	c, err := tls.LoadX509KeyPair(filepath.Join(dir, cert), filepath.Join(dir, key))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("nbd: %s with %s in %s: %w", cert, key, dir, err)
	}
	return c, err
}
