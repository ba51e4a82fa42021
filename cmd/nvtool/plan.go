package main

import (
	"context"
	"fmt"
	"math"

	"github.com/spf13/cobra"

	"nvstore.dev/blobdir"
)

// A planBlob is one blob of a plan. All of it is in bytes.
type planBlob struct {
	Name      string `json:"name"`
	Size      int64  `json:"size"`
	Grown     int64  `json:"grown_size"` // with the growth that the plan allows for
	ChunkSize int64  `json:"chunk_size"`
	Content   int64  `json:"content_bytes"` // in whole blocks
	Map       int64  `json:"map_bytes"`     // nodes that name the chunks
	entry     int64
}

// A plan says what an image needs for some blobs.
type plan struct {
	Blobs     []*planBlob `json:"blobs"`
	Reserved  int64       `json:"reserved_bytes"` // header, roots, settled record and what lies between
	Content   int64       `json:"content_bytes"`
	Nodes     int64       `json:"node_bytes"`      // directory, chunk maps, free space, key slots
	Rewriting int64       `json:"rewriting_bytes"` // the new copy, and two generations under quarantine
	Slack     int64       `json:"slack_bytes"`     // for fragmentation
	ImageSize int64       `json:"image_size"`
	FileSize  int64       `json:"qcow2_file_size"` // of a qcow2 of 64 KiB clusters that is used to the end
}

type planOptions struct {
	chunk         size
	growth, slack int
	atOnce        bool
}

func (a *app) planCmd() *cobra.Command {
	var o planOptions
	c := a.verb("plan NAME=SIZE...", "Say which image size blobs need", func(ctx context.Context, args []string) error {
		p, err := makePlan(args, &o)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(p)
		}
		return a.printPlan(p, &o)
	})
	c.Long = `Say which size an image needs so that these blobs fit and can be rewritten for
ever, sealed or not: content in whole blocks, the nodes that name it, the new
copy of what is being rewritten, and the two older ones that stay out of use so
that a crash can fall back to them. With --at-once all blobs may be rewritten in
one transaction; without it one at a time.`
	c.Example = `  nvtool plan tpm/permanent=16k tpm/volatile=8k uefi/vars=528k
  nvtool create nv.img -f raw --fixed --size $(nvtool plan --json tpm/permanent=16k | jq .image_size)`
	f := c.Flags()
	f.Var(&o.chunk, "chunk-size", "bytes that are rewritten together, a power of two from 4k to 1M (default by size)")
	f.IntVar(&o.growth, "growth", 25, "`PERCENT` by which each blob may grow")
	f.IntVar(&o.slack, "slack", 15, "`PERCENT` of the whole for fragmentation")
	f.BoolVar(&o.atOnce, "at-once", false, "all blobs may be rewritten in one transaction")
	return c
}

// Sizes of DER structures in a sealed store at most (FORMAT.md), and how many
// nodes are half full after splitting.
const (
	block        = blobdir.BlockSize
	planReserved = 196 << 10
	nodeHalf     = (4096 - 48) / 2
	chunkRefMax  = 136
	childMax     = 110
	entryMax     = 480 // without name and chunks; with type, writer and some attributes
	freeMax      = 30
	planMaxSize  = 1 << 50
)

func makePlan(args []string, o *planOptions) (*plan, error) {
	if len(args) == 0 {
		return nil, usagef("plan needs at least one NAME=SIZE")
	}
	if o.growth < 0 || o.growth > 1000 || o.slack < 0 || o.slack > 1000 {
		return nil, usagef("--growth and --slack: 0 to 1000")
	}
	if cs := o.chunk; cs != 0 && (cs < block || cs > 1<<20 || cs&(cs-1) != 0) {
		return nil, invalidf("--chunk-size %s: a power of two from 4k to 1M", cs.String())
	}
	p := &plan{Reserved: planReserved}
	seen := make(map[string]bool)
	for _, arg := range args {
		b, err := planOne(arg, o)
		if err != nil {
			return nil, err
		}
		if seen[b.Name] {
			return nil, invalidf("blob %q is there twice", b.Name)
		}
		seen[b.Name] = true
		p.Blobs = append(p.Blobs, b)
	}
	return p, p.add(o)
}

func planOne(arg string, o *planOptions) (*planBlob, error) {
	name, text, err := splitPair(arg)
	if err != nil {
		return nil, err
	}
	names, err := canonical([]string{name})
	if err != nil {
		return nil, err
	}
	n, err := parseSize(text)
	if err != nil {
		return nil, err
	}
	if n > blobdir.MaxBlobSize {
		return nil, invalidf("blob %q: %d bytes, and %d are the most", name, n, int64(blobdir.MaxBlobSize))
	}
	b := &planBlob{Name: names[0], Size: n, ChunkSize: int64(o.chunk)}
	b.Grown = min(n+ceilDiv(n*int64(o.growth), 100), blobdir.MaxBlobSize)
	if b.ChunkSize == 0 {
		b.ChunkSize = int64(chunkSizeFor(n))
	}
	chunks := ceilDiv(b.Grown, b.ChunkSize)
	b.Content = ceilDiv(b.Grown, block) * block
	b.entry = entryMax + 2*int64(len(b.Name))
	if chunks > 4 {
		b.Map = treeNodes(chunks*chunkRefMax) * block
		b.entry += childMax
	} else {
		b.entry += chunks * chunkRefMax
	}
	return b, nil
}

// treeNodes bounds the nodes of a tree whose items have so many bytes.
func treeNodes(itemBytes int64) int64 {
	level := max(ceilDiv(itemBytes, nodeHalf), 1)
	total := level
	for level > 1 {
		level = ceilDiv(level*childMax, nodeHalf)
		total += level
	}
	return total
}

func levels(itemBytes int64) int64 {
	n := int64(1)
	for level := ceilDiv(itemBytes, nodeHalf); level > 1; n++ {
		level = ceilDiv(level*childMax, nodeHalf)
	}
	return n
}

// add adds it all up. What is free lies in pieces, at worst one for each
// chunk and node that was ever rewritten.
func (p *plan) add(o *planOptions) error {
	var entries, maps, chunks, largest, extent int64
	for _, b := range p.Blobs {
		entries += b.entry
		maps += b.Map
		chunks += ceilDiv(b.Grown, b.ChunkSize)
		p.Content += b.Content
		largest = max(largest, b.Content+b.Map)
		extent = max(extent, ceilDiv(min(b.ChunkSize, b.Grown), block)*block)
		if p.Content > planMaxSize {
			return invalidf("these blobs have more than %s", roughSize(planMaxSize))
		}
	}
	directory := treeNodes(entries) * block
	free := (1 + treeNodes((3*chunks+maps/block)*freeMax)) * block
	const keySlots = 2 * block
	p.Nodes = directory + maps + free + keySlots
	again := largest + levels(entries)*block
	if o.atOnce {
		again = p.Content + maps + directory
	}
	p.Rewriting = 3 * (again + free)
	sum := p.Content + p.Nodes + p.Rewriting
	// A chunk lies in one piece, and what is free may be in smaller ones.
	p.Slack = max(ceilDiv(sum*int64(o.slack), 100), 16*block) + 2*extent
	const step = 64 << 10
	p.ImageSize = max(ceilDiv(p.Reserved+sum+p.Slack, step)*step, 256<<10)
	p.FileSize = qcow2FileSize(p.ImageSize)
	return nil
}

// qcow2FileSize is how long a qcow2 file of 64 KiB clusters and 16-bit
// reference counts gets: header, tables, and one cluster for each of the disk.
func qcow2FileSize(disk int64) int64 {
	const cluster = 64 << 10
	data := ceilDiv(disk, cluster)
	l2 := ceilDiv(data, cluster/8)
	l1 := ceilDiv(l2*8, cluster)
	n := 1 + data + l2 + l1
	blocks := ceilDiv(n+ceilDiv(n, cluster/2)+1, cluster/2)
	return (n + blocks + ceilDiv(blocks*8, cluster)) * cluster
}

func ceilDiv(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64 / b
	}
	return (a + b - 1) / b
}

func (a *app) printPlan(p *plan, o *planOptions) error {
	rows := make([][]string, 0, len(p.Blobs)+8)
	for _, b := range p.Blobs {
		rows = append(rows, []string{printable(b.Name), fmt.Sprint(b.Content),
			fmt.Sprintf("%s, grown by %d%% to %s, in chunks of %s", roughSize(b.Size), o.growth, roughSize(b.Grown), roughSize(b.ChunkSize))})
	}
	which := "the largest blob"
	if o.atOnce {
		which = "all blobs at once"
	}
	rows = append(rows,
		[]string{"(reserved)", fmt.Sprint(p.Reserved), "header, roots, settled record"},
		[]string{"(nodes)", fmt.Sprint(p.Nodes), "directory, chunk maps, free space, key slots"},
		[]string{"(rewriting)", fmt.Sprint(p.Rewriting), "the new copy of " + which + ", and two generations of old ones"},
		[]string{"(slack)", fmt.Sprint(p.Slack), "fragmentation"},
		[]string{"image size", fmt.Sprint(p.ImageSize), roughSize(p.ImageSize) + "; a qcow2 file gets up to " + roughSize(p.FileSize)})
	return a.printTable([]string{"for", "bytes", "because"}, rows)
}
