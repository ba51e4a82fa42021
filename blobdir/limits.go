package blobdir

// Limits of format version 1 (FORMAT.md, section 2). Each is checked before
// anything is allocated for it.
const (
	BlockSize = 4096 // bytes; every extent starts and ends on a multiple of it

	MaxBlobSize = 1 << 40 // bytes of one blob

	maxRoot       = 512  // bytes of a root or settled record
	maxNode       = 4096 // bytes of a node: it always fits one block
	maxLevel      = 12   // levels of a tree above its leaves
	maxName       = 255  // bytes of a blob's name
	maxType       = 64   // bytes of a blob's type
	maxWriter     = 128  // bytes of the writer's name and version
	maxAttrs      = 16   // attributes of a blob
	maxAttrKey    = 64   // bytes of an attribute's key
	maxAttrBytes  = 512  // bytes of all keys and values of a blob
	maxBlobSize   = MaxBlobSize
	maxLive       = 1 << 30 // bytes of a live extent: all of it is read to verify a part
	minChunkSize  = 4096    // bytes; chunk sizes are powers of two
	maxChunkSize  = 1 << 20 // bytes
	maxInline     = 4       // chunks in the entry itself
	maxGeneration = 1 << 62
	maxOffset     = 1 << 62 // bytes
	maxExtensions = 16      // extensions of one structure
	maxKeySlots   = 8192    // bytes of the key-slot structure
	maxFreeExtent = 1 << 44 // bytes of one free extent
	minStoreSize  = 256 << 10
	maxCheckItems = 1000 // problems of one kind that a check lists
)

// Where the fixed structures lie.
const (
	headerOffset  = 0
	rootSlot0     = 64 << 10
	rootSlot1     = 128 << 10
	settledOffset = 192 << 10
	firstEnd      = settledOffset + BlockSize // the first byte past the reserved area
)

var rootSlots = [2]int64{rootSlot0, rootSlot1}

// reserved tells whether [off, off+n) touches a fixed structure's block.
func reserved(off, n int64) bool {
	for _, r := range [...]int64{headerOffset, rootSlot0, rootSlot1, settledOffset} {
		if off < r+BlockSize && r < off+n {
			return true
		}
	}
	return false
}

// roundUp rounds n up to whole blocks.
func roundUp(n int64) int64 { return (n + BlockSize - 1) &^ (BlockSize - 1) }
