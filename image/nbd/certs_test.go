package nbd_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/nbd"
)

// A ca is a folder with an authority, a server's and a client's certificate,
// named as QEMU, libnbd and nbdkit want it.
type ca struct{ dir string }

func newCA(t *testing.T) *ca {
	t.Helper()
	c := &ca{t.TempDir()}
	key, cert := c.issue(t, "ca", nil, nil)
	c.issue(t, "server", cert, key)
	c.issue(t, "client", cert, key)
	return c
}

func (c *ca) issue(t *testing.T, name string, by *x509.Certificate, byKey *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature}
	if by == nil {
		by, byKey = tmpl, key
		tmpl.IsCA, tmpl.KeyUsage = true, x509.KeyUsageCertSign
	} else {
		tmpl.DNSNames, tmpl.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
		tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by, key.Public(), byKey)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	c.write(t, name+"-cert.pem", "CERTIFICATE", der)
	c.write(t, name+"-key.pem", "PRIVATE KEY", keyDER)
	return key, cert
}

func (c *ca) write(t *testing.T, name, kind string, der []byte) {
	t.Helper()
	p := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	require.NoError(t, os.WriteFile(filepath.Join(c.dir, name), p, 0o600))
}

// only returns a folder with some of the files.
func (c *ca) only(t *testing.T, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		require.NoError(t, os.Link(filepath.Join(c.dir, name), filepath.Join(dir, name)))
	}
	return dir
}

func (c *ca) server(t *testing.T, verify bool) *tls.Config {
	t.Helper()
	conf, err := nbd.ServerTLS(c.dir, verify)
	require.NoError(t, err)
	return conf
}

// client returns a configuration, with a certificate of the client's or not.
func (c *ca) client(t *testing.T, own bool) *tls.Config {
	t.Helper()
	dir := c.dir
	if !own {
		dir = c.only(t, "ca-cert.pem")
	}
	conf, err := nbd.ClientTLS(dir)
	require.NoError(t, err)
	return conf
}
