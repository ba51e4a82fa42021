package qcow2

import (
	"nvstore.dev/image"
)

// An Info describes an image. Names in it come from the image and are only
// strings: nothing opens what they refer to.
type Info struct {
	Version       int              `json:"version"`
	VirtualSize   int64            `json:"virtual_size"` // bytes
	ClusterSize   int              `json:"cluster_size"` // bytes
	RefcountBits  int              `json:"refcount_bits"`
	Compression   string           `json:"compression"` // "deflate" or "zstd"
	Encryption    string           `json:"encryption,omitempty"`
	BackingFile   string           `json:"backing_file,omitempty"`
	BackingFormat string           `json:"backing_format,omitempty"`
	DataFile      string           `json:"data_file,omitempty"`
	Features      []Feature        `json:"features,omitempty"`
	Bitmaps       int              `json:"bitmaps,omitempty"`
	Snapshots     []image.Snapshot `json:"snapshots,omitempty"` // nil from Inspect
	Extensions    []Extension      `json:"-"`
}

// A Feature is a feature bit that is set.
type Feature struct {
	Kind string `json:"kind"` // "incompatible", "compatible" or "autoclear"
	Bit  int    `json:"bit"`
	Name string `json:"name"` // of this driver, or of the image's feature name table, or ""
}

// Inspect reads the header of any qcow2 image, also of one that Open refuses.
// It reads nothing but the header's cluster; path is for error messages.
func Inspect(file image.Device, path string) (*Info, error) {
	h, err := readHeader(file, path, false)
	if err != nil {
		return nil, err
	}
	return h.info(), nil
}

// Info describes the image.
func (im *Image) Info() (*Info, error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.usable(false); err != nil {
		return nil, err
	}
	info := im.hdr.info()
	info.Snapshots = im.listSnapshots()
	return info, nil
}

func (h *header) info() *Info {
	info := &Info{
		Version: int(h.version), VirtualSize: int64(h.size), ClusterSize: int(h.clusterSize()),
		RefcountBits: 1 << h.refOrder, BackingFile: h.backing,
		Compression: [...]string{"deflate", "zstd"}[h.compression],
		Encryption:  [...]string{"", "aes", "luks"}[h.crypt],
	}
	for _, f := range []struct {
		kind string
		typ  uint8
		bits uint64
	}{
		{"incompatible", 0, h.incompat}, {"compatible", 1, h.compat}, {"autoclear", 2, h.autoclear},
	} {
		for bit := range 64 {
			if f.bits>>bit&1 != 0 {
				info.Features = append(info.Features, Feature{f.kind, bit, h.knownFeature(f.typ, uint8(bit))})
			}
		}
	}
	for _, x := range h.exts {
		switch x.Type {
		case extBackingFormat:
			info.BackingFormat = string(x.Data)
		case extDataFile:
			info.DataFile = string(x.Data)
		case extBitmaps:
			info.Bitmaps = int(parseBitmapsExt(x.Data).count)
		}
		info.Extensions = append(info.Extensions, Extension{x.Type, append([]byte(nil), x.Data...)})
	}
	return info
}
