// Command nvtool makes, fills, reads, checks and repairs stores of a virtual
// machine's non-volatile state (package nvstore), and packs vital product
// data (package vpd).
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// An app is one run of the command.
type app struct {
	out, err io.Writer // standard output and standard error
	json     bool
	quiet    bool
	started  bool // a verb runs: what goes wrong from now on is no usage error
}

// run executes a command line and returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second signal ends the process where it is.
	context.AfterFunc(ctx, stop)
	a := &app{out: stdout, err: stderr}
	root := a.root()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err != nil && !a.started {
		err = usage(err)
	}
	return a.report(err)
}

const about = `nvtool keeps what a virtual machine's devices remember (TPM state, UEFI
variables, EEPROMs, vital product data) as named blobs in one image:
checksummed, encrypted if a key is given, and replaced atomically.

IMAGE is a path, pebble:DIR[/MACHINE-UUID], nbd+unix:///EXPORT?socket=PATH or
nbd://HOST/EXPORT, or is left out where --image-opts gives a stack in QEMU's
notation: driver=qcow2,file.driver=file,file.filename=...
A key is a --passphrase-file, --passphrase-fd, --key-file, or a prompt.`

const examples = `  nvtool create vm.qcow2 --passphrase-file pass
  nvtool put vm.qcow2 tpm/permanent state.bin --passphrase-file pass
  nvtool ls vm.qcow2 -l
  nvtool get vm.qcow2 tpm/permanent -o state.bin --passphrase-file pass
  nvtool check vm.qcow2 --passphrase-file pass`

func (a *app) root() *cobra.Command {
	c := &cobra.Command{
		Use:           "nvtool",
		Short:         "Keep a virtual machine's non-volatile state in an image",
		Long:          about,
		Example:       examples,
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       version(),
	}
	c.SetVersionTemplate("nvtool {{.Version}}\n")
	c.PersistentFlags().BoolVar(&a.json, "json", false, "print facts, and errors, as JSON")
	c.PersistentFlags().BoolVarP(&a.quiet, "quiet", "q", false, "print no confirmations, warnings or progress")
	c.AddCommand(a.createCmd(), a.infoCmd(), a.putCmd(), a.lsCmd(), a.getCmd(), a.rmCmd(), a.mvCmd(),
		a.checkCmd(), a.planCmd(), a.mapCmd(), a.tortureCmd(), a.versionCmd(), exitCodesHelp())
	c.AddCommand(
		group("snapshot", "Take, list, load and remove a qcow2 image's internal snapshots",
			a.snapshotCreateCmd(), a.snapshotLsCmd(), a.snapshotRevertCmd(), a.snapshotRmCmd()),
		group("key", "List, add and remove the keys of a sealed store",
			a.keyLsCmd(), a.keyAddCmd(), a.keyRmCmd()),
		a.vmCmd(),
		a.imgCmd(),
		a.luksCmd(),
		a.serveCmd(),
		a.liveCmd(),
		a.tpmCmd(),
		group("vpd", "Pack, unpack, show, change, compare, verify and fix vital product data",
			a.vpdPackCmd(), a.vpdUnpackCmd(), a.vpdInspectCmd(), a.vpdVerifyCmd(), a.vpdFixCmd(),
			a.vpdGetCmd(), a.vpdSetCmd(), a.vpdDiffCmd(), a.vpdSchemaCmd(), a.vpdImportCmd(), a.vpdBuildCmd(), a.vpdTemplateCmd()))
	return c
}

// group makes a verb that only has verbs below it.
func group(name, short string, sub ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: name, Short: short, Args: func(c *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usagef("%s has no verb %q", c.CommandPath(), args[0])
		}
		return nil
	}}
	c.RunE = func(c *cobra.Command, _ []string) error {
		return usagef("%s needs a verb; see %s --help", c.CommandPath(), c.CommandPath())
	}
	c.AddCommand(sub...)
	return c
}

// verb makes a command. Arguments are counted by what it runs, because
// --image-opts takes IMAGE's place.
func (a *app) verb(use, short string, fn func(ctx context.Context, args []string) error) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs, DisableFlagsInUseLine: true,
		RunE: func(c *cobra.Command, args []string) error {
			a.started = true
			return fn(c.Context(), args)
		}}
}
