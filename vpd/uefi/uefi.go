// Package uefi packs, parses and edits the UEFI variable stores of EDK2: the
// OVMF_VARS.fd and AAVMF_VARS.fd of virtual machines.
//
// An image is a firmware volume (UEFI Platform Initialization Specification,
// volume 3, section 3.2.1) around a variable store (EDK2,
// MdeModulePkg/Include/Guid/VariableFormat.h):
//
//	+--------+--------+-----------+------+---------------------------------+
//	| volume | store  | variables | free | event log, FTW work block, FTW  |
//	| header | header |           | 0xff | spare area: fault tolerant      |
//	| sum16  |        |           |      | writes, CRC-32                  |
//	+--------+--------+-----------+------+---------------------------------+
//
// A variable is a header with state, attributes, the GUID of its namespace, its
// name in UTF-16 and data, aligned to 4 bytes. One that is changed is written
// anew, and the old one is marked deleted; once the store is full, the firmware
// reclaims it, which the FTW area makes crash-safe.
//
// The spec is the JSON of version 2 that virt-firmware, python-uefivars and
// QEMU's uefi-vars device read and write, with a "format" and what such JSON
// can't say:
//
//	{
//	  "format": "uefi",
//	  "version": 2,
//	  "layout": "ovmf-4m",             // or ovmf-2m, arm-virt, or an object
//	  "variables": [
//	    {"name": "Timeout", "guid": "8be4df61-93ca-11d2-aa0d-00e098032b8c", "attr": 7, "data": "0500"},
//	    {"name": "db", "guid": "d719b2cb-3d3a-4596-a3bc-dad00e67656f", "attr": 39, "data": "...", "time": "..."}
//	  ]
//	}
//
// Data is hexadecimal, or a typed value. Time is the timestamp of an
// authenticated variable, an EFI_TIME of 16 bytes; "count" is its monotonic
// count and "key" the index of its public key, which later versions of the
// specification no longer use. A "digest", the hash of the certificate that a
// private authenticated variable was signed with, is a variable of its own in
// EDK2's stores, certdb; it is accepted if it agrees with that.
//
// The layout as an object has "volume_size", "block_size", "store_size",
// "work_offset" and "work_size" of the FTW block (0 if there is none), and
// "authenticated", false for the old headers without time.
//
// Variables that are deleted or half written have a "state" other than 0x3f and
// are kept, so that the image comes out again; Pack drops them, and says so,
// only if the store would be too small otherwise.
//
// What is irregular is spelt out: "state": "0x3f" for a variable whose name is
// there already, a hex "name" that isn't UTF-16 with a zero at the end,
// "reserved" and "padding" of a variable, "volume_checksum" that is wrong,
// "header" for volume and store headers that aren't as above, "free" for bytes behind the
// variables that aren't erased, "work" for what the areas behind the store
// hold, as patches over 0xff, unless it is just the header of an FTW block, "cut" for the length of
// an image that ends before its volume does, and "trailing" for bytes behind it.
package uefi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"nvstore.dev/vpd"
)

// Name is the format's name in a spec.
const Name = "uefi"

// MaxSize is the most bytes an image may have: QEMU's Arm machines have 64 MiB.
const MaxSize = 64 << 20

// What lies in an image must fit into a spec, where 32 bytes, a variable
// without anything, take 330.
const (
	maxVolume   = 3 << 20
	maxTrailing = 4 << 20 // that isn't fill: the code of a whole OVMF.fd
)

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect wants both headers and a whole volume.
func (format) Detect(image []byte) bool {
	l, err := scan(image)
	return err == nil && l.cut() == 0
}

// A layout is an image cut into its parts; the slices are the image's own.
type layout struct {
	image []byte
	geo   geometry
	vars  []variable
	start int    // of the first variable
	end   int    // behind the last
	limit int    // of the store, within the image
	stop  string // why the variables end before the free space
	area  []byte // behind the store, within the volume
	rest  []byte // behind the volume
}

// cut is how many bytes of the volume are missing.
func (l *layout) cut() int { return max(0, l.geo.volume-len(l.image)) }

// free is what lies behind the variables in the store.
func (l *layout) free() []byte { return l.image[l.end:l.limit] }

// scan cuts an image. It fails if the headers aren't there.
func scan(image []byte) (*layout, error) {
	fail := func(off int, format string, args ...any) (*layout, error) {
		return nil, &vpd.ImageError{Format: Name, Off: int64(off), Msg: fmt.Sprintf(format, args...)}
	}
	if len(image) > MaxSize {
		return fail(0, "%d bytes, want at most %d", len(image), MaxSize)
	}
	geo, off, msg := readGeometry(image)
	if msg != "" {
		return fail(off, "%s", msg)
	}
	l := &layout{image: image, geo: geo, start: geo.header + storeHeaderSize}
	l.limit = min(geo.header+geo.store, geo.volume, len(image))
	volume := min(geo.volume, len(image))
	l.area, l.rest = image[l.limit:volume], image[volume:]
	if n := len(l.rest); n > maxTrailing && !bytes.Equal(l.rest[maxTrailing:n-1], l.rest[maxTrailing+1:]) {
		return fail(volume+maxTrailing, "there is more than fill, %d bytes behind a volume of %d", maxTrailing, volume)
	}
	l.geo.work, l.geo.workSize = findWork(l.area, l.limit)
	l.end = l.start
	for l.stop == "" {
		v, next, stop := readVariable(image[:l.limit], l.end, geo.auth)
		l.stop = stop
		if next == 0 {
			break
		}
		l.vars = append(l.vars, v)
		l.end = next
	}
	return l, nil
}

// erased tells whether every byte is 0xff.
func erased(b []byte) bool {
	for len(b) > 64 { // bytes.Count is the fastest that there is
		n := min(len(b), 1<<16)
		if bytes.Count(b[:n], []byte{0xff}) != n {
			return false
		}
		b = b[n:]
	}
	for _, c := range b {
		if c != 0xff {
			return false
		}
	}
	return true
}

// The FTW block: EDK2, MdeModulePkg/Include/Guid/FaultTolerantWrite.h.
const (
	workHeaderSize = 32
	writeSize      = 40 // a write header, and one of its records
	workAlign      = 256
)

var workGUID = mustGUID("9e58292b-7c68-497d-a0ce-6500fd9f1b95")

// findWork looks for the header of the FTW block behind the store, which
// begins at base.
func findWork(area []byte, base int) (off, size int) {
	for pos := 0; ; pos++ {
		i := bytes.Index(area[pos:], workGUID[:])
		if i < 0 {
			return 0, 0
		}
		pos += i
		if (base+pos)%workAlign != 0 || len(area)-pos < workHeaderSize {
			continue
		}
		queue := binary.LittleEndian.Uint64(area[pos+24:])
		if queue > uint64(len(area)-pos-workHeaderSize) {
			continue
		}
		return base + pos, workHeaderSize + int(queue)
	}
}

// workHeader is the header of an FTW block of a size, valid and with an empty
// queue.
func workHeader(size int) []byte {
	h := bytes.Repeat([]byte{0xff}, workHeaderSize)
	copy(h, workGUID[:])
	binary.LittleEndian.PutUint64(h[24:], uint64(size-workHeaderSize))
	binary.LittleEndian.PutUint32(h[16:], workCRC(h))
	h[20] = 0xfe
	return h
}

// workCRC leaves CRC and state as if erased.
func workCRC(header []byte) uint32 {
	h := bytes.Clone(header[:workHeaderSize])
	copy(h[16:], "\xff\xff\xff\xff\xff")
	return crc32.ChecksumIEEE(h)
}

// pending tells whether the FTW queue holds a write that the firmware will
// finish from the spare area when it starts, over the variables that are here.
func (l *layout) pending() bool {
	if l.geo.workSize == 0 {
		return false
	}
	q := l.image[l.geo.work+workHeaderSize : l.geo.work+l.geo.workSize]
	for len(q) >= writeSize && q[0]&1 == 0 { // the bits are 0 once they hold
		complete, allocated := q[0]&4 == 0, q[0]&2 == 0
		writes, private := binary.LittleEndian.Uint64(q[24:]), binary.LittleEndian.Uint64(q[32:])
		q = q[writeSize:]
		room := uint64(len(q))
		if private > room || writes > room/(writeSize+private) {
			return false
		}
		step := int(writeSize + private)
		for range writes {
			if allocated && !complete && q[0]&2 == 0 && q[0]&4 != 0 {
				return true
			}
			q = q[step:]
		}
	}
	return false
}
