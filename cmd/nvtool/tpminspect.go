package main

import (
	"context"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"nvstore.dev/tpmstate"
)

// tpmFacts are what a TPM says of itself. None of it is secret.
type tpmFacts struct {
	Version     string          `json:"version"`
	Writer      string          `json:"writer,omitempty"`
	Sizes       map[string]int  `json:"sizes"`
	Vendor      string          `json:"vendor,omitempty"`
	Firmware    string          `json:"firmware,omitempty"`
	Revision    string          `json:"revision,omitempty"`
	Hierarchies []tpmHierarchy  `json:"hierarchies,omitempty"`
	Lockout     *tpmLockout     `json:"lockout,omitempty"`
	Resets      *tpmResets      `json:"resets,omitempty"`
	PCRBanks    []string        `json:"pcr_banks,omitempty"`
	NV          []tpmNV         `json:"nv_indices"`
	Persistent  []tpmPersistent `json:"persistent_objects"`
}

type tpmHierarchy struct {
	Name    string `json:"name"`
	AuthSet bool   `json:"auth_set"`
}

type tpmLockout struct {
	Active       bool   `json:"active"`
	Failures     uint32 `json:"failures"`
	MaxFailures  uint32 `json:"max_failures"`
	Interval     uint32 `json:"interval_seconds"`
	Recovery     uint32 `json:"recovery_seconds"`
	DisableClear bool   `json:"disable_clear"`
}

type tpmResets struct {
	Resets   uint32 `json:"resets"`
	Restarts uint32 `json:"restarts"`
	Clock    uint64 `json:"clock_ms"`
}

type tpmNV struct {
	Index       string   `json:"index"`
	Size        int      `json:"size"`
	Type        string   `json:"type"`
	Attributes  []string `json:"attributes"`
	NameAlg     string   `json:"name_algorithm"`
	Name        string   `json:"name"`
	Policy      bool     `json:"policy"`
	Certificate string   `json:"certificate,omitempty"` // subject or SAN of a certificate that anyone may read
	Content     string   `json:"content,omitempty"`     // hexadecimal; with --secrets
}

type tpmPersistent struct {
	Handle     string   `json:"handle"`
	Type       string   `json:"type"`
	Attributes []string `json:"attributes"`
	Name       string   `json:"name"`
}

// facts runs the TPM and asks it.
func (a *app) tpmFacts(ctx context.Context, p *tpmPlace, s *tpmState, secrets bool) (*tpmFacts, error) {
	f := &tpmFacts{Version: s.version.String(), Writer: s.writer, Sizes: map[string]int{}, NV: []tpmNV{}, Persistent: []tpmPersistent{}}
	for k, b := range s.State {
		if b != nil {
			f.Sizes[tpmstate.Kind(k).String()] = len(b)
		}
	}
	if s.State[tpmstate.Permanent] == nil {
		return f, nil
	}
	r, err := a.runTPM(ctx, p.nvtpm, s.State, s.version)
	if err != nil {
		return nil, fmt.Errorf("the TPM doesn't start on this state: %w", err)
	}
	defer r.end()
	if s.version == tpmstate.TPM12 {
		return f, nil // its state isn't decoded; it has started
	}
	for _, fn := range []func(*tpmRun) error{f.properties, f.resets, f.banks, func(r *tpmRun) error { return f.nv(r, secrets) }, f.persistent} {
		if err := fn(r); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// properties reads the fixed and the variable properties (TPM 2.0 Library,
// part 2, 6.13).
func (f *tpmFacts) properties(r *tpmRun) error {
	props := map[tpm2.TPMPT]uint32{}
	for _, first := range []tpm2.TPMPT{tpm2.TPMPTFamilyIndicator, tpm2.TPMPTPermanent} {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(first), PropertyCount: 100}.Execute(r)
		if err != nil {
			return err
		}
		list, err := rsp.CapabilityData.Data.TPMProperties()
		if err != nil {
			return err
		}
		for _, p := range list.TPMProperty {
			props[p.Property] = p.Value
		}
	}
	text := func(pts ...tpm2.TPMPT) string {
		var b []byte
		for _, pt := range pts {
			b = binary.BigEndian.AppendUint32(b, props[pt])
		}
		return strings.TrimSpace(strings.Trim(string(b), "\x00"))
	}
	f.Vendor = strings.Join([]string{text(tpm2.TPMPTManufacturer),
		text(tpm2.TPMPTVendorString1, tpm2.TPMPTVendorString2, tpm2.TPMPTVendorString3, tpm2.TPMPTVendorString4)}, " ")
	f.Firmware = fmt.Sprintf("%08x.%08x", props[tpm2.TPMPTFirmwareVersion1], props[tpm2.TPMPTFirmwareVersion2])
	f.Revision = fmt.Sprintf("%d.%02d", props[tpm2.TPMPTRevision]/100, props[tpm2.TPMPTRevision]%100)
	flags := props[tpm2.TPMPTPermanent] // TPMA_PERMANENT
	for i, name := range []string{"owner", "endorsement", "lockout"} {
		f.Hierarchies = append(f.Hierarchies, tpmHierarchy{name, flags>>i&1 != 0})
	}
	f.Lockout = &tpmLockout{Active: flags>>9&1 != 0, DisableClear: flags>>8&1 != 0,
		Failures: props[tpm2.TPMPTLockoutCounter], MaxFailures: props[tpm2.TPMPTMaxAuthFail],
		Interval: props[tpm2.TPMPTLockoutInterval], Recovery: props[tpm2.TPMPTLockoutRecovery]}
	return nil
}

func (f *tpmFacts) resets(r *tpmRun) error {
	rsp, err := tpm2.ReadClock{}.Execute(r)
	if err != nil {
		return err
	}
	c := rsp.CurrentTime.ClockInfo
	f.Resets = &tpmResets{c.ResetCount, c.RestartCount, c.Clock}
	return nil
}

func (f *tpmFacts) banks(r *tpmRun) error {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 100}.Execute(r)
	if err != nil {
		return err
	}
	list, err := rsp.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return err
	}
	for _, s := range list.PCRSelections {
		for _, b := range s.PCRSelect {
			if b != 0 {
				f.PCRBanks = append(f.PCRBanks, algName(s.Hash))
				break
			}
		}
	}
	return nil
}

// handles lists the handles from first on, in its range.
func handles(r *tpmRun, first uint32) ([]tpm2.TPMHandle, error) {
	var out []tpm2.TPMHandle
	for {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(r)
		if err != nil {
			return nil, err
		}
		list, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			return nil, err
		}
		out = append(out, list.Handle...)
		if !rsp.MoreData || len(list.Handle) == 0 {
			return out, nil
		}
		first = uint32(list.Handle[len(list.Handle)-1]) + 1
	}
}

func (f *tpmFacts) nv(r *tpmRun, secrets bool) error {
	list, err := handles(r, 0x01000000)
	if err != nil {
		return err
	}
	for _, h := range list {
		rsp, err := tpm2.NVReadPublic{NVIndex: h}.Execute(r)
		if err != nil {
			return err
		}
		pub, err := rsp.NVPublic.Contents()
		if err != nil {
			return err
		}
		n := tpmNV{Index: fmt.Sprintf("%#08x", uint32(h)), Size: int(pub.DataSize), Type: nvType(pub.Attributes.NT),
			Attributes: bits(attributesOf(pub.Attributes), nvAttributes), NameAlg: algName(pub.NameAlg),
			Name: hex.EncodeToString(rsp.NVName.Buffer), Policy: len(pub.AuthPolicy.Buffer) > 0}
		if content, ok := nvContent(r, h, rsp.NVName, pub); ok {
			// The indices of certificates are for all to read.
			if uint32(h)>>16 == 0x01c0 {
				n.Certificate = certificateName(content)
			}
			if secrets {
				n.Content = hex.EncodeToString(content)
			}
		}
		f.NV = append(f.NV, n)
	}
	return nil
}

// nvContent reads an index that an empty authorization opens.
func nvContent(r *tpmRun, h tpm2.TPMHandle, name tpm2.TPM2BName, pub *tpm2.TPMSNVPublic) ([]byte, bool) {
	var auth tpm2.TPMHandle
	authName := tpm2.TPM2BName{}
	switch a := pub.Attributes; {
	case !a.Written || a.ReadLocked:
		return nil, false
	case a.AuthRead:
		auth, authName = h, name
	case a.PPRead:
		auth = tpm2.TPMRHPlatform
	case a.OwnerRead:
		auth = tpm2.TPMRHOwner
	default:
		return nil, false
	}
	handle := tpm2.AuthHandle{Handle: auth, Name: authName, Auth: tpm2.PasswordAuth(nil)}
	if auth != h {
		handle.Name = tpm2.HandleName(auth)
	}
	var out []byte
	for off := 0; off < int(pub.DataSize); {
		n := min(int(pub.DataSize)-off, 1024)
		rsp, err := tpm2.NVRead{AuthHandle: handle, NVIndex: tpm2.NamedHandle{Handle: h, Name: name}, Size: uint16(n), Offset: uint16(off)}.Execute(r)
		if err != nil {
			return nil, false
		}
		out = append(out, rsp.Data.Buffer...)
		off += n
	}
	return out, true
}

func certificateName(der []byte) string {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return ""
	}
	if s := c.Subject.String(); s != "" {
		return fmt.Sprintf("%s, by %s", s, c.Issuer)
	}
	return "by " + c.Issuer.String()
}

func (f *tpmFacts) persistent(r *tpmRun) error {
	list, err := handles(r, 0x81000000)
	if err != nil {
		return err
	}
	for _, h := range list {
		rsp, err := tpm2.ReadPublic{ObjectHandle: h}.Execute(r)
		if err != nil {
			return err
		}
		pub, err := rsp.OutPublic.Contents()
		if err != nil {
			return err
		}
		f.Persistent = append(f.Persistent, tpmPersistent{Handle: fmt.Sprintf("%#08x", uint32(h)), Type: objectType(pub),
			Attributes: bits(binary.BigEndian.Uint32(tpm2.Marshal(pub.ObjectAttributes)), objectAttributes), Name: hex.EncodeToString(rsp.Name.Buffer)})
	}
	return nil
}

func attributesOf(a tpm2.TPMANV) uint32 { return binary.BigEndian.Uint32(tpm2.Marshal(a)) }

// Names of attribute bits (part 2, 13.4 TPMA_NV and 8.3 TPMA_OBJECT), as
// tpm2-tools print them.
var (
	nvAttributes = map[int]string{0: "ppwrite", 1: "ownerwrite", 2: "authwrite", 3: "policywrite", 10: "policydelete", 11: "writelocked",
		12: "writeall", 13: "writedefine", 14: "write_stclear", 15: "globallock", 16: "ppread", 17: "ownerread", 18: "authread",
		19: "policyread", 25: "no_da", 26: "orderly", 27: "clear_stclear", 28: "readlocked", 29: "written", 30: "platformcreate", 31: "read_stclear"}
	objectAttributes = map[int]string{1: "fixedtpm", 2: "stclear", 4: "fixedparent", 5: "sensitivedataorigin", 6: "userwithauth",
		7: "adminwithpolicy", 10: "noda", 11: "encryptedduplication", 16: "restricted", 17: "decrypt", 18: "sign"}
)

func bits(v uint32, names map[int]string) []string {
	out := []string{}
	for i := range 32 {
		if v>>i&1 != 0 && names[i] != "" {
			out = append(out, names[i])
		}
	}
	return out
}

func nvType(t tpm2.TPMNT) string {
	if s := map[tpm2.TPMNT]string{0: "ordinary", 1: "counter", 2: "bits", 4: "extend", 8: "pin fail", 9: "pin pass"}[t]; s != "" {
		return s
	}
	return fmt.Sprintf("type %d", t)
}

func algName(a tpm2.TPMAlgID) string {
	if s := map[tpm2.TPMAlgID]string{tpm2.TPMAlgSHA1: "sha1", tpm2.TPMAlgSHA256: "sha256", tpm2.TPMAlgSHA384: "sha384", tpm2.TPMAlgSHA512: "sha512"}[a]; s != "" {
		return s
	}
	return fmt.Sprintf("%#04x", uint16(a))
}

func objectType(pub *tpm2.TPMTPublic) string {
	switch pub.Type {
	case tpm2.TPMAlgRSA:
		if p, err := pub.Parameters.RSADetail(); err == nil {
			return fmt.Sprintf("rsa%d", p.KeyBits)
		}
		return "rsa"
	case tpm2.TPMAlgECC:
		if p, err := pub.Parameters.ECCDetail(); err == nil {
			if s := map[tpm2.TPMECCCurve]string{tpm2.TPMECCNistP256: "ecc-p256", tpm2.TPMECCNistP384: "ecc-p384", tpm2.TPMECCNistP521: "ecc-p521"}[p.CurveID]; s != "" {
				return s
			}
		}
		return "ecc"
	case tpm2.TPMAlgKeyedHash:
		return "keyedhash"
	case tpm2.TPMAlgSymCipher:
		return "symcipher"
	}
	return fmt.Sprintf("%#04x", uint16(pub.Type))
}
