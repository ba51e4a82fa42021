package uefi

import (
	"bytes"
	"encoding/binary"
	"maps"

	"nvstore.dev/vpd/internal/spec"
)

// Who may change a private authenticated variable is the hash of a
// certificate: in QEMU's JSON "digest" of the variable, in EDK2 an entry of a
// variable of its own (SecurityPkg/Library/AuthVariableLib): the length of the
// whole, then for each variable its GUID, the sizes of the entry, of the name
// in characters, and of the hash, the name without a zero, and the hash.
const (
	certName      = "certdb"
	certEntrySize = 28
	digestSize    = 32
)

var certGUID = mustGUID("d9bee56e-75dc-49d9-b4d7-b534210f637a")

func isCertDB(v *variable) bool {
	name, _ := v.text()
	return v.guid == certGUID && name == certName && v.live()
}

// certEntries calls f with the identity of each variable in a certdb, and its
// hash.
func certEntries(db []byte, f func(id string, hash []byte)) {
	le := binary.LittleEndian
	if len(db) < 4 || uint64(le.Uint32(db)) != uint64(len(db)) {
		return
	}
	for b := db[4:]; len(b) >= certEntrySize; {
		node, chars, size := uint64(le.Uint32(b[16:])), uint64(le.Uint32(b[20:])), uint64(le.Uint32(b[24:]))
		if node != certEntrySize+2*chars+size || node > uint64(len(b)) {
			return
		}
		name := b[certEntrySize : certEntrySize+2*chars]
		f(string(b[:16])+string(name)+"\x00\x00", b[node-size:node])
		b = b[node:]
	}
}

// digests finds the hash of each private authenticated variable.
func (l *layout) digests() map[string][]byte {
	m := map[string][]byte{}
	for i := range l.vars {
		if isCertDB(&l.vars[i]) {
			clear(m)
			certEntries(l.vars[i].data, func(id string, hash []byte) { m[id] = hash })
		}
	}
	maps.DeleteFunc(m, func(_ string, hash []byte) bool { return len(hash) != digestSize })
	return m
}

// A digest is one that a spec gives a variable.
type digest struct {
	path string
	v    *variable
	hash []byte
}

// addDigests puts digests into certdb, which it makes if need be.
func addDigests(vars []*variable, list []digest) ([]*variable, error) {
	if len(list) == 0 {
		return vars, nil
	}
	var db *variable
	have := map[string][]byte{}
	for _, v := range vars {
		if isCertDB(v) {
			db = v
			clear(have)
			certEntries(v.data, func(id string, hash []byte) { have[id] = hash })
		}
	}
	if db == nil {
		db = &variable{state: stateAdded, attr: attrNonVolatile | attrBoot | attrRuntime | attrTimeAuth,
			guid: certGUID, name: encodeName(certName), data: []byte{4, 0, 0, 0}}
		vars = append(vars, db)
	}
	le := binary.LittleEndian
	for _, d := range list {
		if hash, ok := have[d.v.id()]; ok {
			if !bytes.Equal(hash, d.hash) {
				return nil, spec.Errorf(d.path, "is not the one in the variable certdb, %x", hash)
			}
			continue
		}
		name := d.v.name[:len(d.v.name)-2]
		e := append([]byte{}, d.v.guid[:]...)
		e = le.AppendUint32(e, uint32(certEntrySize+len(name)+len(d.hash)))
		e = le.AppendUint32(e, uint32(len(name)/2))
		e = le.AppendUint32(e, uint32(len(d.hash)))
		e = append(append(e, name...), d.hash...)
		if len(db.data) < 4 || int(le.Uint32(db.data)) != len(db.data) {
			return nil, spec.Errorf(d.path, "can't be added to the variable certdb, which is damaged: its length is not %d", len(db.data))
		}
		db.data = append(bytes.Clone(db.data), e...)
		le.PutUint32(db.data, uint32(len(db.data)))
		have[d.v.id()] = d.hash
	}
	db.dataSize = uint32(len(db.data))
	db.nameSize = uint32(len(db.name))
	db.padding = bytes.Repeat([]byte{0xff}, db.pad())
	return vars, nil
}

// shape says why a digest in a spec is no good.
func (d *digest) shape() error {
	switch {
	case len(d.hash) != digestSize:
		return spec.Errorf(d.path, "has %d bytes, want the %d of a SHA-256", len(d.hash), digestSize)
	case d.v.attr&attrTimeAuth == 0 || d.v.state != stateAdded && d.v.state != stateInTransition:
		return spec.Errorf(d.path, "belongs to variables whose attributes have 0x%x, and that aren't deleted", attrTimeAuth)
	}
	if _, ok := d.v.text(); !ok {
		return spec.Errorf(d.path, "the variable's name %x can't be in certdb", d.v.name)
	}
	return nil
}
