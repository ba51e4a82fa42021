package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// caFlags say which certificate authority signs.
type caFlags struct{ dir, cert, key string }

func (c *caFlags) given() bool { return c.dir != "" || c.cert != "" }

// An authority signs certificates of endorsement keys and platforms.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// open returns nil if no authority is given. A folder without one gets one.
func (c *caFlags) open() (*authority, error) {
	cert, key := c.cert, c.key
	if c.dir != "" {
		cert, key = filepath.Join(c.dir, "ca-cert.pem"), filepath.Join(c.dir, "ca-key.pem")
		if _, err := os.Stat(cert); errors.Is(err, fs.ErrNotExist) {
			if err := makeCA(c.dir, cert, key); err != nil {
				return nil, fmt.Errorf("making a certificate authority: %w", err)
			}
		}
	}
	if cert == "" {
		return nil, nil
	}
	a := &authority{}
	der, err := readPEM(cert, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, fmt.Errorf("%s: %w", cert, err)
	}
	if der, err = readPEM(key, "PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY"); err != nil {
		return nil, err
	}
	if a.key, err = parseKey(der); err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	pub, ok := a.key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !a.cert.IsCA || !ok || !pub.Equal(a.cert.PublicKey) {
		return nil, invalidf("%s isn't the certificate of an authority with the key in %s", cert, key)
	}
	return a, nil
}

func readPEM(path string, types ...string) ([]byte, error) {
	p, err := readLimited(path)
	if err != nil {
		return nil, err
	}
	for b, rest := pem.Decode(p); b != nil; b, rest = pem.Decode(rest) {
		for _, t := range types {
			if b.Type == t {
				return b.Bytes, nil
			}
		}
	}
	return nil, invalidf("%s has no PEM block %q", path, types[0])
}

func parseKey(der []byte) (crypto.Signer, error) {
	if k, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		if s, ok := k.(crypto.Signer); ok {
			return s, nil
		}
	}
	if k, err := x509.ParseECPrivateKey(der); err == nil {
		return k, nil
	}
	if k, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return k, nil
	}
	return nil, errors.New("not a private key")
}

// makeCA makes a root of ten years, P-384. The key comes first: a certificate
// without its key would be taken for a whole authority.
func makeCA(dir, cert, key string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return err
	}
	now := time.Now().UTC().Truncate(time.Second)
	t := &x509.Certificate{SerialNumber: serial(), Subject: pkix.Name{CommonName: "nvtool local CA"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
	der, err := x509.CreateCertificate(rand.Reader, t, t, k.Public(), k)
	if err != nil {
		return err
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return err
	}
	write := func(path, typ string, der []byte) error {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		err = pem.Encode(f, &pem.Block{Type: typ, Bytes: der})
		return errors.Join(err, f.Sync(), f.Close())
	}
	if err := write(key, "PRIVATE KEY", kder); err != nil {
		return err
	}
	return errors.Join(write(cert, "CERTIFICATE", der), syncDir(dir))
}

func serial() *big.Int {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)) // never fails
	return n.Add(n, big.NewInt(1))
}

// Object identifiers of the TCG (EK Credential Profile 2.5, 3.2; Platform
// Certificate Profile 1.1, 3.2).
var (
	oidManufacturer    = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidModel           = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidVersion         = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
	oidEKCertificate   = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidPlatform        = asn1.ObjectIdentifier{2, 23, 133, 8, 2}
	oidPlatManuStr     = asn1.ObjectIdentifier{2, 23, 133, 5, 1, 1}
	oidPlatModel       = asn1.ObjectIdentifier{2, 23, 133, 5, 1, 4}
	oidPlatVersion     = asn1.ObjectIdentifier{2, 23, 133, 5, 1, 5}
	oidSubjectAltName  = asn1.ObjectIdentifier{2, 5, 29, 17}
	ekKeyUsage         = x509.KeyUsageKeyEncipherment
	certificateForever = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) // RFC 5280, 4.1.2.5
)

// endorse certifies an endorsement key.
func (a *authority) endorse(pub crypto.PublicKey, machine string) ([]byte, error) {
	san, err := altName([]pkix.AttributeTypeAndValue{{Type: oidManufacturer, Value: "id:00001014"},
		{Type: oidModel, Value: "nvtpm"}, {Type: oidVersion, Value: "id:00010000"}})
	if err != nil {
		return nil, err
	}
	usage := ekKeyUsage
	if _, ok := pub.(*ecdsa.PublicKey); ok {
		usage = x509.KeyUsageKeyAgreement
	}
	return a.issue(pub, machine, usage, oidEKCertificate, san)
}

// platform certifies that the endorsement key's TPM is in a platform.
func (a *authority) platform(pub crypto.PublicKey, machine string) ([]byte, error) {
	san, err := altName([]pkix.AttributeTypeAndValue{{Type: oidPlatManuStr, Value: "nvstore"},
		{Type: oidPlatModel, Value: "virtual machine"}, {Type: oidPlatVersion, Value: "1"}})
	if err != nil {
		return nil, err
	}
	return a.issue(pub, machine, x509.KeyUsageDigitalSignature, oidPlatform, san)
}

func (a *authority) issue(pub crypto.PublicKey, machine string, usage x509.KeyUsage, eku asn1.ObjectIdentifier, san []byte) ([]byte, error) {
	t := &x509.Certificate{SerialNumber: serial(), NotBefore: time.Now().UTC().Add(-time.Hour).Truncate(time.Second), NotAfter: certificateForever,
		KeyUsage: usage, UnknownExtKeyUsage: []asn1.ObjectIdentifier{eku}, BasicConstraintsValid: true,
		ExtraExtensions: []pkix.Extension{{Id: oidSubjectAltName, Critical: machine == "", Value: san}}}
	if machine != "" {
		t.Subject = pkix.Name{CommonName: machine}
	}
	return x509.CreateCertificate(rand.Reader, t, a.cert, pub, a.key)
}

// altName makes a SubjectAltName with one directory name.
func altName(attrs []pkix.AttributeTypeAndValue) ([]byte, error) {
	var name pkix.RDNSequence
	for _, at := range attrs {
		name = append(name, pkix.RelativeDistinguishedNameSET{at})
	}
	der, err := asn1.Marshal(name)
	if err != nil {
		return nil, err
	}
	dir, err := asn1.Marshal(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: der})
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagSequence, IsCompound: true, Bytes: dir})
}
