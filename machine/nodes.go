package machine

import (
	"strconv"
	"strings"
)

// Node names that QEMU's options give to the parts of a machine's disk.
const (
	FileNode  = "nvstore-file" // the image file
	LUKSNode  = "nvstore-luks" // the container in it, if the image is in one
	DiskNode  = "nvstore-disk" // what is in it: takes snapshots
	GuestNode = "guest"        // the guest's disk
	StateNode = "nv"           // the state window
)

// A Blockdev is one argument of QEMU's -blockdev, and of blockdev-add.
type Blockdev struct {
	Driver    string           `json:"driver"`
	NodeName  string           `json:"node-name"`
	Filename  string           `json:"filename,omitempty"`
	File      string           `json:"file,omitempty"` // the node below
	Encrypt   *BlockdevEncrypt `json:"encrypt,omitempty"`
	KeySecret string           `json:"key-secret,omitempty"`
	Offset    int64            `json:"offset,omitempty"`
	Size      int64            `json:"size,omitempty"`
	Discard   string           `json:"discard,omitempty"`
}

// A BlockdevEncrypt says how a qcow2 node is encrypted by itself.
type BlockdevEncrypt struct {
	Format    string `json:"format"`
	KeySecret string `json:"key-secret"`
}

// String writes the argument in QEMU's notation of keys and values.
func (b *Blockdev) String() string {
	var s strings.Builder
	add := func(key, value string) {
		if value == "" {
			return
		}
		if s.Len() > 0 {
			s.WriteByte(',')
		}
		s.WriteString(key + "=" + strings.ReplaceAll(value, ",", ",,"))
	}
	add("driver", b.Driver)
	add("node-name", b.NodeName)
	add("filename", b.Filename)
	add("file", b.File)
	if b.Encrypt != nil {
		add("encrypt.format", b.Encrypt.Format)
		add("encrypt.key-secret", b.Encrypt.KeySecret)
	}
	add("key-secret", b.KeySecret)
	if b.Driver == "raw" && b.Size > 0 {
		add("offset", strconv.FormatInt(b.Offset, 10))
		add("size", strconv.FormatInt(b.Size, 10))
	}
	add("discard", b.Discard)
	return s.String()
}

// A File says how QEMU opens a machine's image.
type File struct {
	Path   string
	Format string // qcow2, raw or luks
	// KeySecret is the ID of QEMU's secret object with the passphrase of a
	// luks image, or of a qcow2 that is encrypted by itself.
	KeySecret string
	// Container is the same of a luks container that the image lies in, and
	// is empty where it lies in none.
	Container string
}

// Nodes returns the block nodes of a machine's disk, in the order in which QEMU
// has to make them.
func (l *Layout) Nodes(f *File) []Blockdev {
	const unmap = "unmap"
	disk := Blockdev{Driver: f.Format, NodeName: DiskNode, File: FileNode, Discard: unmap}
	switch {
	case f.KeySecret != "" && f.Format == "qcow2":
		disk.Encrypt = &BlockdevEncrypt{"luks", f.KeySecret}
	case f.KeySecret != "":
		disk.KeySecret = f.KeySecret
	}
	nodes := []Blockdev{{Driver: "file", NodeName: FileNode, Filename: f.Path, Discard: unmap}}
	if f.Container != "" {
		nodes = append(nodes, Blockdev{Driver: "luks", NodeName: LUKSNode, File: FileNode, KeySecret: f.Container, Discard: unmap})
		disk.File = LUKSNode
	}
	return append(nodes, disk,
		Blockdev{Driver: "raw", NodeName: GuestNode, File: DiskNode, Size: l.DiskSize, Discard: unmap},
		Blockdev{Driver: "raw", NodeName: StateNode, File: DiskNode, Offset: l.StateOffset, Size: l.StateSize, Discard: unmap})
}
