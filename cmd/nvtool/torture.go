package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/nvstore"
)

type tortureOptions struct {
	ref     imageRef
	key     keyFlags
	seconds float64
	record  string
	verify  bool
	create  bool
	seed    uint64
}

func (a *app) tortureCmd() *cobra.Command {
	var o tortureOptions
	c := a.verb("torture IMAGE --seconds N [--record FILE]", "Random transactions, to be killed at will; --verify checks what was acknowledged",
		func(ctx context.Context, args []string) error { return a.torture(ctx, &o, args) })
	c.Long = `Run random transactions on blobs below "torture/", and keep a record of them in
a file outside of the image. Before a transaction its operations are written to
the record and flushed; after the store acknowledged it, that is written and
flushed too. Kill nvtool, or cut the power, at any moment: --verify then demands
that the store holds exactly what the last acknowledged transaction left, or
that and the one that had begun. Starting again goes on from there.

Content is derived from the record's seed, so the record stays small. Without
--record it is IMAGE.torture.`
	c.Example = `  nvtool torture nv.img --seconds 60 & sleep 5; kill -9 $!
  nvtool torture nv.img --verify`
	o.ref.flags(c)
	o.key.flags(c, "the ")
	f := c.Flags()
	f.Float64Var(&o.seconds, "seconds", 0, "how long to run; 0 is until a signal comes")
	f.StringVar(&o.record, "record", "", "the record's `FILE`")
	f.BoolVar(&o.verify, "verify", false, "compare the store with the record, and change neither")
	f.BoolVar(&o.create, "create", false, "make the image if it isn't there")
	f.Uint64Var(&o.seed, "seed", 0, "of a new record; 0 is random")
	c.MarkFlagsMutuallyExclusive("verify", "create")
	return c
}

func (a *app) torture(ctx context.Context, o *tortureOptions, args []string) error {
	if _, err := o.ref.take(args, 0, 0, ""); err != nil {
		return err
	}
	if o.record == "" {
		if o.ref.opts != "" {
			return usagef("--image-opts needs a --record")
		}
		o.record = recordPath(o.ref.location)
	}
	if o.verify {
		return a.tortureVerify(ctx, o)
	}
	return a.tortureRun(ctx, o)
}

// tortureVerify compares the store with the record.
func (a *app) tortureVerify(ctx context.Context, o *tortureOptions) (err error) {
	rec, err := readRecord(o.record)
	if err != nil {
		return err
	}
	s, err := a.open(ctx, &o.ref, &o.key, reading)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	done, err := rec.outcome(s)
	if err != nil {
		return a.explain(&o.ref, err)
	}
	pending := "none"
	if rec.begun != nil {
		pending = map[bool]string{true: "committed", false: "undone"}[done]
	}
	if a.json {
		return a.printJSON(struct {
			Acknowledged int64  `json:"acknowledged"`
			Blobs        int    `json:"blobs"`
			Seed         uint64 `json:"seed"`
			Pending      string `json:"pending"`
		}{rec.acked, len(rec.state), rec.seed, pending})
	}
	a.sayf("%s: all %d acknowledged transactions are there; the one in flight: %s", printable(o.ref.location), rec.acked, pending)
	return nil
}

// tortureRun runs transactions until time is up.
func (a *app) tortureRun(ctx context.Context, o *tortureOptions) (err error) {
	s, err := a.tortureOpen(ctx, o)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	if o.seed == 0 {
		var p [8]byte
		if _, err := rand.Read(p[:]); err != nil {
			return err
		}
		o.seed = binary.LittleEndian.Uint64(p[:])
	}
	rec, err := openRecord(o.record, o.seed)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rec.close()) }()
	done, err := rec.outcome(s)
	if err != nil {
		return a.explain(&o.ref, err)
	}
	if err := rec.resolve(done); err != nil {
		return err
	}
	a.sayf("%s: seed %d, from transaction %d on", printable(o.record), rec.seed, rec.next)
	start := time.Now()
	first := rec.acked
	// Other choices in each run, as the counter goes on.
	rng := mrand.New(mrand.NewPCG(rec.seed, uint64(rec.next)))
	for ctx.Err() == nil && (o.seconds <= 0 || time.Since(start).Seconds() < o.seconds) {
		t := rec.random(rng)
		if err := rec.begin(t); err != nil {
			return err
		}
		if err := s.Update(func(tx *nvstore.Tx) error { return rec.apply(tx, t) }); err != nil {
			return a.explain(&o.ref, err)
		}
		if err := rec.resolve(true); err != nil {
			return err
		}
	}
	n := rec.acked - first
	a.sayf("%d transactions in %.1f s, all acknowledged", n, time.Since(start).Seconds())
	return nil
}

func (a *app) tortureOpen(ctx context.Context, o *tortureOptions) (*nvstore.Store, error) {
	if o.create {
		err := a.tortureCreate(ctx, o)
		if err != nil && kindOf(err).name != "exists" {
			return nil, err
		}
	}
	return a.open(ctx, &o.ref, &o.key, writing)
}

func (a *app) tortureCreate(ctx context.Context, o *tortureOptions) error {
	cred, err := o.key.credential(ctx, a, true)
	if err != nil {
		return err
	}
	defer wipe(cred)
	if o.ref.opts != "" {
		return usagef("--create makes no image for --image-opts")
	}
	s, err := nvstore.Create(o.ref.location, &nvstore.CreateOptions{Format: o.ref.format, Key: cred, Idle: -1})
	if err != nil {
		return a.explain(&o.ref, err)
	}
	err = a.created(s, &o.ref)
	closing(s, &err)
	return err
}

// A tortureOp is one operation on one blob.
type tortureOp struct {
	verb string // put, write, truncate, delete, rename
	name string
	to   string // of rename
	a, b int64  // put: size; write: offset, length; truncate: size
}

func (op tortureOp) String() string {
	switch op.verb {
	case "put", "truncate":
		return fmt.Sprintf("%s %s %d", op.verb, op.name, op.a)
	case "write":
		return fmt.Sprintf("%s %s %d %d", op.verb, op.name, op.a, op.b)
	case "rename":
		return fmt.Sprintf("%s %s %s", op.verb, op.name, op.to)
	}
	return op.verb + " " + op.name
}

// A transaction is a number and what it does.
type transaction struct {
	n   int64
	ops []tortureOp
}

// Limits of the load.
const (
	tortureBlobs  = 12
	tortureSize   = 96 << 10
	torturePrefix = "torture/"
)

// random makes up the next transaction.
func (r *record) random(rng *mrand.Rand) *transaction {
	t := &transaction{n: r.next}
	st := r.state.clone()
	for range 1 + rng.IntN(4) {
		op := randomOp(st, rng)
		if err := st.apply(t.n, len(t.ops), op); err != nil {
			panic("internal error: " + err.Error())
		}
		t.ops = append(t.ops, op)
	}
	return t
}

func randomOp(st state, rng *mrand.Rand) tortureOp {
	name := fmt.Sprintf("%s%d", torturePrefix, rng.IntN(tortureBlobs))
	b := st[name]
	if b == nil {
		return tortureOp{verb: "put", name: name, a: randomSize(rng)}
	}
	switch rng.IntN(10) {
	case 0:
		return tortureOp{verb: "delete", name: name}
	case 1:
		to := fmt.Sprintf("%s%d", torturePrefix, rng.IntN(tortureBlobs))
		if st[to] == nil {
			return tortureOp{verb: "rename", name: name, to: to}
		}
	case 2:
		return tortureOp{verb: "truncate", name: name, a: randomSize(rng)}
	case 3, 4, 5, 6:
		if len(b.layers) < maxLayers {
			off := rng.Int64N(b.size + 1)
			return tortureOp{verb: "write", name: name, a: off, b: 1 + rng.Int64N(9000)}
		}
	}
	return tortureOp{verb: "put", name: name, a: randomSize(rng)}
}

// randomSize is often small, sometimes at a block's edge, and rarely large.
func randomSize(rng *mrand.Rand) int64 {
	switch rng.IntN(8) {
	case 0:
		return rng.Int64N(tortureSize + 1)
	case 1:
		return max(4096*rng.Int64N(5)+rng.Int64N(3)-1, 0)
	}
	return rng.Int64N(9000)
}
