// Command guest is the only program of a small Linux guest. It does with
// /dev/tpm0 and the disk what lines on the second serial port say, and answers
// each with a line: "ok ..." or "error ...".
package main

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"golang.org/x/sys/unix"
)

const (
	index  = tpm2.TPMHandle(0x01500010)
	device = "/dev/tpm0"
	// variable is a UEFI variable's file: its name, and its vendor's GUID.
	variable = "/efi/NvstoreRound-5a1f0d44-7f0c-4f6e-9f3d-3f0a6c0d2b11"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("guest:", err)
	}
	// The first process must not end.
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func run() error {
	if err := os.MkdirAll("/dev", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("dev", "/dev", "devtmpfs", 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount /dev: %w", err)
	}
	if err := modules(); err != nil {
		return err
	}
	port, err := os.OpenFile("/dev/ttyS1", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	if err := raw(port); err != nil {
		return err
	}
	g := &guest{}
	say := func(s string) { fmt.Fprintf(port, "%s\n", s) }
	if err := g.open(); err != nil {
		say("error " + err.Error())
		return err
	}
	say("ok ready")
	for in := bufio.NewScanner(port); in.Scan(); {
		words := strings.Fields(in.Text())
		if len(words) == 0 {
			continue
		}
		out, err := g.do(words[0], words[1:])
		if err != nil {
			say("error " + strings.ReplaceAll(err.Error(), "\n", "; "))
			continue
		}
		say(strings.TrimSpace("ok " + out))
	}
	return errors.New("the serial port is at its end")
}

// modules loads those of the kernel's that came along, in order of their names.
func modules() error {
	list, err := os.ReadDir("/modules")
	if err != nil {
		return err
	}
	for _, e := range list {
		f, err := os.Open("/modules/" + e.Name())
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.ENODEV) { // efivarfs under SeaBIOS
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
	}
	return nil
}

// raw makes a line discipline of none.
func raw(f *os.File) error {
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return err
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = t.Cflag&^unix.CBAUD | unix.B115200 | unix.CS8 | unix.CREAD | unix.CLOCAL
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	return unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
}

type guest struct {
	tpm      transport.TPMCloser
	memories []memory // beside the TPM; the disk is the first

	mu    sync.Mutex // held for each round of the loop
	round uint64
	loop  bool
	err   error
}

func (g *guest) open() error {
	deadline := time.Now().Add(time.Minute)
	for {
		var err error
		if g.tpm, err = linuxtpm.Open(device); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	for {
		d, err := openDisk("/dev/vda")
		if err == nil {
			g.memories = append(g.memories, d)
			break
		}
		if time.Now().After(deadline) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	if d, err := openDisk("/dev/vdb"); err == nil {
		g.memories = append(g.memories, d)
	}
	return g.openVariable()
}

// openVariable makes a UEFI variable, if this machine has such.
func (g *guest) openVariable() error {
	if err := os.MkdirAll("/efi", 0o755); err != nil {
		return err
	}
	if unix.Mount("efivarfs", "/efi", "efivarfs", 0, "") != nil {
		return nil // SeaBIOS
	}
	f, err := os.OpenFile(variable, os.O_WRONLY|os.O_CREATE, 0o644)
	if errors.Is(err, unix.EPERM) { // it is there already, and protected
		return fmt.Errorf("%s is there", variable)
	}
	if err != nil {
		return err
	}
	v := &uefiVariable{f}
	g.memories = append(g.memories, v)
	return v.write(0)
}

// A memory is something that keeps a number.
type memory interface {
	write(n uint64) error
	read() (uint64, error)
}

// A disk keeps it at its start.
type disk struct {
	path string
	f    *os.File
}

func openDisk(path string) (*disk, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_SYNC, 0)
	return &disk{path, f}, err
}

func (d *disk) write(n uint64) error {
	_, err := d.f.WriteAt(append(binary.BigEndian.AppendUint64(nil, n), make([]byte, 4088)...), 0)
	return err
}

// read goes past the page cache.
func (d *disk) read() (uint64, error) {
	fd, err := unix.Open(d.path, unix.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(b)
	if _, err := unix.Pread(fd, b, 0); err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}

// A uefiVariable keeps it behind its attributes: non-volatile, of boot and run
// time.
type uefiVariable struct{ f *os.File }

func (v *uefiVariable) write(n uint64) error {
	_, err := v.f.Write(binary.BigEndian.AppendUint64([]byte{7, 0, 0, 0}, n))
	return err
}

func (v *uefiVariable) read() (uint64, error) {
	p, err := os.ReadFile(variable)
	if err != nil {
		return 0, err
	}
	if len(p) != 12 {
		return 0, fmt.Errorf("%s has %d bytes", variable, len(p))
	}
	return binary.BigEndian.Uint64(p[4:]), nil
}

func (g *guest) do(verb string, args []string) (string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	number := func(i int) int {
		if i >= len(args) {
			return 0
		}
		n, _ := strconv.Atoi(args[i])
		return n
	}
	switch verb {
	case "define":
		_, err := tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner,
			PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(number(0)),
				Attributes: tpm2.TPMANV{AuthRead: true, AuthWrite: true, NoDA: true, NT: tpm2.TPMNTOrdinary}})}.Execute(g.tpm)
		return "", err
	case "write":
		p, err := hex.DecodeString(strings.Join(args, ""))
		if err != nil {
			return "", err
		}
		return "", g.write(p)
	case "read":
		p, err := g.read(uint16(number(0)))
		return hex.EncodeToString(p), err
	case "extend":
		_, err := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(number(0)), Auth: tpm2.PasswordAuth(nil)},
			Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}}}.Execute(g.tpm)
		return "", err
	case "pcr":
		rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
			{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(uint(number(0)))}}}}.Execute(g.tpm)
		if err != nil {
			return "", err
		}
		return hex.EncodeToString(rsp.PCRValues.Digests[0].Buffer), nil
	case "loop":
		if !g.loop {
			g.loop = true
			go g.rounds()
		}
		return "", nil
	case "numbers": // of the TPM, the disk, and what else there is
		list, err := g.numbers()
		return strings.Trim(fmt.Sprint(list), "[]"), err
	case "from":
		g.round = uint64(number(0))
		return "", nil
	case "agree":
		return g.agree()
	case "stop":
		g.loop = false
		return fmt.Sprint(g.round), g.err
	case "reboot":
		g.tpm.Close()
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
	return "", fmt.Errorf("no verb %q", verb)
}

func (g *guest) name() (tpm2.NamedHandle, error) {
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(g.tpm)
	if err != nil {
		return tpm2.NamedHandle{}, err
	}
	return tpm2.NamedHandle{Handle: index, Name: pub.NVName}, nil
}

// patiently runs fn again where the kernel gave a command up: it waits for some,
// as TPM2_NV_Read, for 2 s, and a busy host may take longer after a snapshot.
func patiently(fn func() error) (err error) {
	for range 5 {
		if err = fn(); !errors.Is(err, unix.ETIME) {
			break
		}
	}
	return err
}

func (g *guest) write(p []byte) error {
	return patiently(func() error { return g.writeOnce(p) })
}

func (g *guest) read(size uint16) (p []byte, err error) {
	err = patiently(func() (err error) {
		p, err = g.readOnce(size)
		return err
	})
	return p, err
}

func (g *guest) writeOnce(p []byte) error {
	n, err := g.name()
	if err != nil {
		return err
	}
	_, err = tpm2.NVWrite{AuthHandle: tpm2.AuthHandle{Handle: index, Name: n.Name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex: n, Data: tpm2.TPM2BMaxNVBuffer{Buffer: p}}.Execute(g.tpm)
	return err
}

func (g *guest) readOnce(size uint16) ([]byte, error) {
	n, err := g.name()
	if err != nil {
		return nil, err
	}
	rsp, err := tpm2.NVRead{AuthHandle: tpm2.AuthHandle{Handle: index, Name: n.Name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex: n, Size: size}.Execute(g.tpm)
	if err != nil {
		return nil, err
	}
	return rsp.Data.Buffer, nil
}

// rounds writes a number to the TPM and then to the rest, over and over.
func (g *guest) rounds() {
	for {
		g.mu.Lock()
		if !g.loop || g.err != nil {
			g.mu.Unlock()
			return
		}
		g.round++
		g.err = g.write(binary.BigEndian.AppendUint64(nil, g.round))
		for _, m := range g.memories {
			if g.err == nil {
				g.err = m.write(g.round)
			}
		}
		if g.err == nil {
			fmt.Println("round", g.round) // a record outside of the machine
		}
		g.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
}

// agree compares the guest's own memory, the TPM and the rest, between two
// rounds.
func (g *guest) agree() (string, error) {
	if g.err != nil {
		return "", g.err
	}
	got, err := g.numbers()
	if err != nil {
		return "", err
	}
	for _, n := range got {
		if n != g.round {
			return "", fmt.Errorf("it is round %d; TPM, disk and so on have %d", g.round, got)
		}
	}
	return fmt.Sprint(g.round), nil
}

func (g *guest) numbers() ([]uint64, error) {
	p, err := g.read(8)
	if err != nil {
		return nil, err
	}
	list := []uint64{binary.BigEndian.Uint64(p)}
	for _, m := range g.memories {
		n, err := m.read()
		if err != nil {
			return nil, err
		}
		list = append(list, n)
	}
	return list, nil
}
