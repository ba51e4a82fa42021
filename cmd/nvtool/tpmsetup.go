package main

import (
	"context"
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/spf13/cobra"

	"nvstore.dev/tpmstate"
)

// Platform commands that go-tpm doesn't have (TPM 2.0 Library, part 2, 6.5.2).
const (
	ccChangeEPS   = 0x124
	ccChangePPS   = 0x125
	ccPCRAllocate = 0x12b
)

// NV indices and handles of endorsement keys (TCG EK Credential Profile 2.5,
// 2.2.1.4 and 2.2.1.5; handles as swtpm_setup has them).
var endorsementKeys = []struct {
	name        string
	template    tpm2.TPMTPublic
	certificate tpm2.TPMHandle
	handle      tpm2.TPMHandle
}{
	{"rsa2048", tpm2.RSAEKTemplate, 0x01c00002, 0x81010001},
	{"ecc-p256", tpm2.ECCEKTemplate, 0x01c0000a, 0x81010016},
}

// platformCertificate is the index of the platform's certificate.
const platformCertificate tpm2.TPMHandle = 0x01c08000

type setupOptions struct {
	place   tpmPlace
	tpm12   bool
	keep    bool
	replace bool
	banks   []string
	keys    []string
	ca      caFlags
	machine string
}

func (a *app) tpmSetupCmd() *cobra.Command {
	var o setupOptions
	c := a.verb("setup IMAGE [--ca DIR]", "Make a TPM, with endorsement keys and certificates", func(ctx context.Context, args []string) error {
		if _, _, err := o.place.take(args, 0, ""); err != nil {
			return err
		}
		return a.tpmSetup(ctx, &o)
	})
	c.Long = `Manufacture a TPM in memory and put it into the store, in one commit: endorsement
keys at their handles, PCR banks, and, with --ca or --ca-cert and --ca-key, certificates
of the endorsement keys and of the platform at their NV indices, as swtpm_setup does.
--ca DIR has a local certificate authority, which is made if the folder is empty.`
	c.Example = `  nvtool tpm setup vm.qcow2 --ca ca --machine vm1 --passphrase-file pass
  nvtool tpm setup vm.qcow2 --pcr-banks sha256,sha384`
	o.place.ref.flags(c)
	o.place.key.flags(c, "the store's ")
	o.place.runFlags(c)
	f := c.Flags()
	f.BoolVar(&o.tpm12, "tpm12", false, "make a TPM 1.2: manufactured only, without certificates")
	f.BoolVar(&o.keep, "keep", false, "add to the TPM that the store has, in place of making one")
	f.BoolVar(&o.replace, "replace", false, "replace the TPM that the store has")
	f.StringSliceVar(&o.banks, "pcr-banks", []string{"sha256"}, "PCR `BANKS` that are active: sha1, sha256, sha384, sha512")
	f.StringSliceVar(&o.keys, "ek", []string{"rsa2048", "ecc-p256"}, "endorsement `KEYS` to make")
	f.StringVar(&o.ca.dir, "ca", "", "`DIR` of a local certificate authority")
	f.StringVar(&o.ca.cert, "ca-cert", "", "`FILE` with the authority's certificate, PEM")
	f.StringVar(&o.ca.key, "ca-key", "", "`FILE` with the authority's private key, PEM")
	f.StringVar(&o.machine, "machine", "", "`NAME` of the machine, in the certificates")
	c.MarkFlagsMutuallyExclusive("keep", "replace")
	c.MarkFlagsMutuallyExclusive("ca", "ca-cert")
	c.MarkFlagsRequiredTogether("ca-cert", "ca-key")
	return c
}

var bankIDs = map[string]uint16{"sha1": 0x4, "sha256": 0xb, "sha384": 0xc, "sha512": 0xd}

func (o *setupOptions) check() error {
	for _, b := range o.banks {
		if _, ok := bankIDs[b]; !ok {
			return usagef("--pcr-banks %s: sha1, sha256, sha384 or sha512", b)
		}
	}
	for _, k := range o.keys {
		if k != "rsa2048" && k != "ecc-p256" {
			return usagef("--ek %s: rsa2048 or ecc-p256", k)
		}
	}
	if o.tpm12 && (o.ca.given() || o.keep) {
		return usagef("a TPM 1.2 is manufactured, and that is all: leave out --ca and --keep")
	}
	return nil
}

func (a *app) tpmSetup(ctx context.Context, o *setupOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	ca, err := o.ca.open()
	if err != nil {
		return err
	}
	s := &tpmState{version: tpmstate.TPM20, form: "store"}
	if o.tpm12 {
		s.version = tpmstate.TPM12
	}
	if o.keep {
		if s, err = o.place.readStore(ctx, a, o.place.ref.location); err != nil {
			return err
		}
	} else if !o.replace {
		if err := o.place.refuseTPM(ctx, a); err != nil {
			return err
		}
	}
	r, err := a.runTPM(ctx, o.place.nvtpm, s.State, s.version)
	if err != nil {
		return err
	}
	defer r.end()
	var made []string
	if !o.tpm12 {
		if made, err = o.equip(r, ca); err != nil {
			return err
		}
	}
	if s.State, err = r.take(); err != nil {
		return err
	}
	if err := o.place.writeStore(ctx, a, o.place.ref.location, s); err != nil {
		return a.explain(&o.place.ref, err)
	}
	a.sayf("%s: a TPM %s%s", o.place.ref.location, s.version, strings.Join(append([]string{""}, made...), ", "))
	if a.json {
		return a.printJSON(s.facts())
	}
	return nil
}

// equip makes banks, keys and certificates, and says what it made.
func (o *setupOptions) equip(r *tpmRun, ca *authority) (made []string, err error) {
	if err := o.allocate(r); err != nil {
		return nil, fmt.Errorf("PCR banks: %w", err)
	}
	made = append(made, "banks "+strings.Join(o.banks, " "))
	var first crypto.PublicKey
	for _, k := range endorsementKeys {
		if !slices.Contains(o.keys, k.name) {
			continue
		}
		pub, err := makeEK(r, k.template, k.handle)
		if err != nil {
			return nil, fmt.Errorf("endorsement key %s: %w", k.name, err)
		}
		made = append(made, "EK "+k.name)
		if first == nil {
			first = pub
		}
		if ca == nil {
			continue
		}
		der, err := ca.endorse(pub, o.machine)
		if err == nil {
			err = storeCertificate(r, k.certificate, der)
		}
		if err != nil {
			return nil, fmt.Errorf("certificate of the endorsement key %s: %w", k.name, err)
		}
		made = append(made, "its certificate")
	}
	if ca != nil && first != nil {
		der, err := ca.platform(first, o.machine)
		if err == nil {
			err = storeCertificate(r, platformCertificate, der)
		}
		if err != nil {
			return nil, fmt.Errorf("platform certificate: %w", err)
		}
		made = append(made, "platform certificate")
	}
	return made, nil
}

// allocate sets the PCR banks, which count from the next reset on.
func (o *setupOptions) allocate(r *tpmRun) error {
	names := []string{"sha1", "sha256", "sha384", "sha512"}
	params := binary.BigEndian.AppendUint32(nil, uint32(len(names)))
	for _, n := range names {
		on := byte(0)
		if slices.Contains(o.banks, n) {
			on = 0xff
		}
		params = append(binary.BigEndian.AppendUint16(params, bankIDs[n]), 3, on, on, on)
	}
	if err := r.platform(ccPCRAllocate, params); err != nil {
		return err
	}
	if _, err := r.Send([]byte("\x80\x01\x00\x00\x00\x0c\x00\x00\x01\x45\x00\x00")); err != nil {
		return err
	}
	return r.restart()
}

// makeEK makes a primary key in the endorsement hierarchy, and keeps it. One
// that is there already is replaced.
func makeEK(r *tpmRun, template tpm2.TPMTPublic, at tpm2.TPMHandle) (crypto.PublicKey, error) {
	auth := func(h tpm2.TPMHandle) tpm2.AuthHandle {
		return tpm2.AuthHandle{Handle: h, Name: tpm2.HandleName(h), Auth: tpm2.PasswordAuth(nil)}
	}
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: auth(tpm2.TPMRHEndorsement), InPublic: tpm2.New2B(template)}.Execute(r)
	if err != nil {
		return nil, err
	}
	defer tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}.Execute(r)
	pub, err := rsp.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	if old, err := (tpm2.ReadPublic{ObjectHandle: at}).Execute(r); err == nil {
		if _, err := (tpm2.EvictControl{Auth: auth(tpm2.TPMRHOwner), ObjectHandle: &tpm2.NamedHandle{Handle: at, Name: old.Name}, PersistentHandle: at}).Execute(r); err != nil {
			return nil, err
		}
	}
	_, err = tpm2.EvictControl{Auth: auth(tpm2.TPMRHOwner),
		ObjectHandle: &tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, PersistentHandle: at}.Execute(r)
	if err != nil {
		return nil, err
	}
	return tpm2.Pub(*pub)
}

// storeCertificate defines an index with the attributes of swtpm_setup's, and
// fills it.
func storeCertificate(r *tpmRun, index tpm2.TPMHandle, der []byte) error {
	platform := tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Name: tpm2.HandleName(tpm2.TPMRHPlatform), Auth: tpm2.PasswordAuth(nil)}
	if old, err := (tpm2.NVReadPublic{NVIndex: index}).Execute(r); err == nil {
		if _, err := (tpm2.NVUndefineSpace{AuthHandle: platform, NVIndex: tpm2.NamedHandle{Handle: index, Name: old.NVName}}).Execute(r); err != nil {
			return err
		}
	}
	_, err := tpm2.NVDefineSpace{AuthHandle: platform, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
		NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(der)),
		Attributes: tpm2.TPMANV{PPWrite: true, WriteDefine: true, PPRead: true, OwnerRead: true, AuthRead: true, NoDA: true, PlatformCreate: true},
	})}.Execute(r)
	if err != nil {
		return err
	}
	for off := 0; off < len(der); off += 1024 {
		pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(r)
		if err != nil {
			return err
		}
		_, err = tpm2.NVWrite{AuthHandle: platform, NVIndex: tpm2.NamedHandle{Handle: index, Name: pub.NVName},
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: der[off:min(off+1024, len(der))]}, Offset: uint16(off)}.Execute(r)
		if err != nil {
			return err
		}
	}
	return nil
}

// newIdentity gives a state new seeds. What hangs on the old ones goes.
func (a *app) newIdentity(ctx context.Context, program string, s *tpmState) error {
	if s.version != tpmstate.TPM20 {
		return withHint(&kinded{errors.New("a TPM 1.2 can't be given another identity"), errors.ErrUnsupported}, "nvtool tpm setup --tpm12 makes a new one")
	}
	r, err := a.runTPM(ctx, program, s.State, s.version)
	if err != nil {
		return &kinded{err, errTPM}
	}
	defer r.end()
	_, err = tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Name: tpm2.HandleName(tpm2.TPMRHPlatform), Auth: tpm2.PasswordAuth(nil)}}.Execute(r)
	if err != nil {
		return err
	}
	for _, cc := range []uint32{ccChangeEPS, ccChangePPS} {
		if err := r.platform(cc, nil); err != nil {
			return err
		}
	}
	platform := tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Name: tpm2.HandleName(tpm2.TPMRHPlatform), Auth: tpm2.PasswordAuth(nil)}
	list, err := handles(r, 0x01c00000)
	if err != nil {
		return err
	}
	for _, h := range list {
		if h > 0x01c0ffff {
			break
		}
		pub, err := tpm2.NVReadPublic{NVIndex: h}.Execute(r)
		if err != nil {
			return err
		}
		if _, err := (tpm2.NVUndefineSpace{AuthHandle: platform, NVIndex: tpm2.NamedHandle{Handle: h, Name: pub.NVName}}).Execute(r); err != nil {
			return fmt.Errorf("the old certificate at %#08x: %w", uint32(h), err)
		}
	}
	s.writer = ""
	s.State, err = r.take()
	return err
}
